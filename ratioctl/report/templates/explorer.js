"use strict";
// Draws the page from two JSON blocks: the document (counterfactuals.json, unchanged) and the pictures.
// Text from outside reaches the page through textContent only; numbers are rounded here and nowhere else.

const read = id => JSON.parse(document.getElementById(id).textContent);
const doc = read("document"), extra = read("extra");
const byId = id => document.getElementById(id);

// --- helpers -------------------------------------------------------------------------------------------

const el = (tag, properties = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties))
    if (key.includes("-") || key === "role" || key === "for") node.setAttribute(key, value);
    else node[key] = value;
  node.append(...children.flat().filter(child => child != null));
  return node;
};
const svg = (tag, attributes = {}, ...children) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
};

// Text with control characters and writing-direction marks escaped.
const safe = text => String(text).replace(/[\p{C}\p{Z}]/gu, c => {
  if (c === " ") return c;
  const code = c.codePointAt(0), hex = code.toString(16);
  return code < 256 ? "\\x" + hex.padStart(2, "0") : code < 65536 ? "\\u" + hex.padStart(4, "0") : "\\U" + hex.padStart(8, "0");
});
const stem = path => safe(path).split("/").at(-1);

// A confidence is never rounded to 0 or 1; other numbers get three digits.
const two = p => 0 < p && p < 0.005 ? "<0.01" : 0.995 <= p && p < 1 ? ">0.99" : p.toFixed(2);
const three = x => String(Number(x.toPrecision(3)));
const six = x => String(Number(x.toPrecision(6)));
// A radius on an axis: linf as a multiple of 1/255 where it is one.
const radius = (column, eps) => {
  const levels = Math.round(eps * 255);
  return column.norm === "inf" && eps && Math.abs(eps * 255 - levels) < 1e-3 ? `${levels}/255` : three(eps);
};
const number = (value, shown = two) => el("data", { value: String(value), textContent: shown(value) });
const size = norm => "l" + ({ 1: "₁", 1.5: "₁.₅", 2: "₂", inf: "∞" }[norm] ?? safe(norm));

const source = name => "data:image/png;base64," + extra.data[extra.files[name]];
// The number of pixels of the picture, so that the style sheet can enlarge it by an integer factor.
const sized = (node, side) => (node.closest("figure") ?? node).style.setProperty("--side", side);
const picture = (name, alt) => {
  const image = el("img", { src: source(name), alt, draggable: false, decoding: "sync" });
  image.onload = () => sized(image, image.naturalWidth);
  return image;
};

// --- the request -----------------------------------------------------------------------------------------

// A column is one photograph under one model and norm; a group is one photograph with all its columns.
const groups = [];
{
  const found = new Map(), seen = new Map();
  doc.images.forEach((entry, index) => {
    const norm = String(entry.norm ?? doc.norm), key = JSON.stringify([entry.path, entry.sha256]);
    const mine = JSON.stringify([key, entry.model, norm]), time = seen.get(mine) ?? 0;
    seen.set(mine, time + 1);
    if (!found.has(key + time)) groups.push(found.set(key + time, { path: entry.path, columns: [] }).get(key + time));
    found.get(key + time).columns.push({ entry, norm, model: doc.models[entry.model], notes: extra.notes[index] ?? [] });
  });
}
const norms = new Set(groups.flatMap(group => group.columns.map(column => column.norm)));
const names = doc.models.map(model => {
  const twins = doc.models.filter(other => other.name === model.name);
  return safe(model.name) + (twins.length > 1 ? ` ${model.digest.slice(0, 6)}` : "");
});
const title = column => [
  doc.models.length > 1 ? names[column.entry.model] : "", norms.size > 1 ? size(column.norm) : "",
].filter(Boolean).join(", ");

const targetsOf = group => [...new Set(group.columns.flatMap(column => column.entry.targets.map(t => t.target)))];
const columnsOf = (group, target) => group.columns.filter(column => answerOf(column, target));
const answerOf = (column, target) => column.entry.targets.find(answer => answer.target === target);
const stepsOf = (group, target) => Math.max(0, ...columnsOf(group, target).map(c => answerOf(c, target)?.budgets.length ?? 0));

// What a column shows at a step of the slider: step 0 is the photograph, the last one its largest budget.
const pointAt = (column, target, step, steps) => {
  const answer = answerOf(column, target), { original, input_png } = column.entry;
  const place = answer ? Math.round(step / Math.max(steps, 1) * answer.budgets.length) : 0;
  if (place) return answer.budgets[place - 1];
  const confidence = original.probabilities[column.model.labels.indexOf(target)];
  return { eps: 0, png: input_png, confidence, predicted: original.label, probabilities: original.probabilities };
};
const isOod = (column, point) =>
  column.model.threshold != null && Math.max(...point.probabilities) < column.model.threshold;

// --- state --------------------------------------------------------------------------------------------------

const most = Math.max(0, ...groups.flatMap(group => targetsOf(group).map(target => stepsOf(group, target))));
const state = { group: null, target: null, step: most, steps: most, gain: 1, flipped: false };
let playing = null;  // the timer of the Play button
let watchers = [];  // functions that redraw what depends on the step, the gain or the comparison
const redraw = () => watchers.forEach(watch => watch());
const watching = watch => { watchers.push(watch); watch(); };

// A screen reader reads a focused slider itself; other changes are announced here.
const say = text => { byId("said").textContent = text; };
const setStep = step => {
  state.step = Math.max(0, Math.min(state.steps, step));
  redraw();
  if (!playing && document.activeElement?.type !== "range") say(document.querySelector("main [type=range]").getAttribute("aria-valuetext"));
};
const setFlipped = flipped => {
  if (flipped === state.flipped) return;
  state.flipped = flipped;
  redraw();
  say(flipped ? "The original" : "The counterfactual");
};

// --- the detail view ----------------------------------------------------------------------------------------

const ball = (column, point) =>
  point.eps ? [size(column.norm), " ≤ ", number(point.eps, six)] : ["unchanged"];

const labeled = (label, p, hit) => el("span", { className: hit ? "hit" : "" }, el("b", { textContent: safe(label) }), " ", number(p));

const oodTag = () => el("span", { className: "tag", textContent: "OOD" });
const oodNotice = (column, what) => el("p", { className: "notice" }, el("b", { textContent: what }), " The highest confidence, ",
  number(column.entry.original.confidence), ` (${safe(column.entry.original.label)}), is below the threshold of `,
  number(column.model.threshold), ".");

// The radius that sentences state: of a picture that is in distribution, where there is one. Null: none reaches the target.
const reachOf = (column, target) => {
  const answer = answerOf(column, target);
  if (answer.flip_eps == null) return null;
  const accepted = answer.budgets.some(point => point.predicted === target && !isOod(column, point));
  const eps = accepted ? Math.max(answer.flip_eps, answer.in_distribution_eps ?? 0) : answer.flip_eps;
  return { eps, flip: answer.flip_eps, ood: !accepted };
};

const lead = (column, target) => {
  const { original } = column.entry, reach = reachOf(column, target), name = title(column);
  const line = el("p", { className: "lead" });
  if (name) line.append(el("b", { className: "model", textContent: name }), ": ");
  line.append(name ? "predicted " : "Predicted ", labeled(original.label, original.confidence), ". ");
  const goal = el("b", { className: "hit", textContent: safe(target) });
  if (!reach) line.append("No budget reaches ", goal, ...until(), ".");
  else if (reach.eps === 0) line.append("Already ", goal, ...until(), "; the counterfactuals raise its confidence.");
  else if (reach.flip === 0) line.append("Already ", goal, ...until(), "; in distribution from ", size(column.norm), " ", number(reach.eps, three), " on.");
  else {
    line.append(doc.until == null ? "Flips to " : "Reaches ", goal, ...until(), " at ", size(column.norm), " ", number(reach.flip, three));
    if (reach.ood) line.append("; out of distribution at every budget.");
    else if (reach.eps === reach.flip) line.append(".");
    else line.append(", in distribution from ", number(reach.eps, three), " on.");
  }
  return [original.is_ood ? oodNotice(column, name ? `Out of distribution for ${name}.` : "Out of distribution.") : null, line];
};
const radiusName = reach => doc.until != null ? "reached at " : reach.eps === reach.flip ? "flip radius " : "ID radius ";
const until = () => doc.until == null ? [] : [" at a confidence of ", number(doc.until)];

const enlarge = (what, draw, alt) => el("button", {
  type: "button", className: "icon", textContent: "⤢", "aria-label": `Enlarge ${what}`, title: `Enlarge ${what}`,
  onclick: () => openEnlarged(what, draw, alt),
});

// What each model predicts for the original; norms of one model share a line.
const predictions = columns => {
  const models = columns.filter((column, index) => columns.findIndex(other => other.model === column.model) === index);
  return models.map(column => prediction(column, names.length > 1 ? `${names[column.entry.model]}: ` : "predicted "));
};
const prediction = ({ entry }, before) => el("span", { className: "line" }, before,
  labeled(entry.original.label, entry.original.confidence), entry.original.is_ood ? [" ", oodTag()] : null);

const originalFigure = columns => {
  const { entry, model } = columns[0], alt = `The original, ${stem(entry.path)}`;
  const [x, y, w, h] = model.region?.box ?? [], marked = model.region && w * h === model.region.pixels;
  const outline = marked ? el("span", { className: "region" }) : null;
  if (marked) Object.entries({ x, y, w, h }).forEach(([key, value]) => outline.style.setProperty(`--${key}`, value));
  return el("figure", { className: "picture original" }, el("span", { className: "frame" }, picture(entry.input_png, alt), outline),
    el("figcaption", {}, el("span", { className: "what" }, "Original", enlarge("the original", () => source(entry.input_png), () => alt)),
      predictions(columns),
      model.region ? el("span", { className: "line quiet" }, marked ? "dashed: " : "", "only ", number(model.region.pixels, six), model.region.pixels === 1 ? " pixel may change" : " pixels may change") : null));
};

const counterfactualFigure = (column, target) => {
  const name = title(column), alt = () => {
    if (state.flipped) return `The original, ${stem(column.entry.path)}`;
    const point = pointAt(column, target, state.step, state.steps);
    return `${point.eps ? `Changed by at most ${size(column.norm)} ${six(point.eps)}` : "Unchanged"}, ${safe(target)} ${two(point.confidence)}, predicted ${safe(point.predicted)}`;
  };
  const shown = () => state.flipped ? column.entry.input_png : pointAt(column, target, state.step, state.steps).png;
  const image = picture(column.entry.input_png, "");
  const hold = el("button", { type: "button", className: "hold", "aria-label": `Hold to see the original${name ? ` under ${name}` : ""}`,
    title: "Hold (or hold space) to see the original" }, image, el("span", { className: "over", textContent: "original" }));
  holding(hold);
  const confidence = el("span", { className: "line" }), predicted = el("span", { className: "line" }), ood = el("div");
  watching(() => {
    const point = pointAt(column, target, state.step, state.steps), hit = point.predicted === target;
    if (image.dataset.name !== shown()) image.src = source(image.dataset.name = shown());
    image.alt = alt();
    hold.classList.toggle("flipped", state.flipped);
    hold.classList.toggle("reached", hit);
    hold.setAttribute("aria-pressed", state.flipped);
    confidence.replaceChildren(labeled(target, point.confidence, hit), " ", el("span", { className: "quiet" }, ...ball(column, point)));
    predicted.replaceChildren(...(hit ? [] : ["predicted ", el("b", { textContent: safe(point.predicted) })]));
    ood.replaceChildren(...(point.eps && isOod(column, point) ? [
      oodTag(), el("span", { className: "line quiet" }, "highest ",
        number(Math.max(...point.probabilities)), ", below ", number(column.model.threshold))] : []));
  });
  return el("figure", { className: "picture counterfactual" }, hold,
    el("figcaption", {}, el("span", { className: "what" }, name || "Counterfactual",
      enlarge(`the counterfactual${name ? ` of ${name}` : ""}`, () => source(shown()), alt)), confidence, predicted, ood));
};

// Press and hold, by pointer or with space or enter; a click without either (assistive software) switches.
const holding = button => {
  let keyed = false;
  button.addEventListener("pointerdown", event => { if (event.button === 0) setFlipped(true); });
  button.addEventListener("contextmenu", event => event.preventDefault());
  button.addEventListener("keydown", event => { keyed = event.key === "Enter" || event.key === " "; if (keyed) { event.preventDefault(); setFlipped(true); } });
  button.addEventListener("click", event => { if (event.detail === 0 && !keyed) setFlipped(!state.flipped); keyed = false; });
};
for (const kind of ["pointerup", "pointercancel", "blur"]) addEventListener(kind, () => setFlipped(false));

const film = (columns, target) => {
  const steps = state.steps, places = [...Array(steps + 1).keys()], shared = new Set(columns.map(column =>
    JSON.stringify([column.norm, places.map(step => pointAt(column, target, step, steps).eps)]))).size === 1;
  const head = (column, step) => step ? number(pointAt(column, target, step, steps).eps, six) : "original";
  const table = el("table", { className: "film" });
  table.append(el("caption", { className: "hidden" }, `Confidence in ${safe(target)} by budget`));
  if (shared) table.append(el("thead", {}, el("tr", {}, places.map(step => el("th", { scope: "col" }, head(columns[0], step))))));
  const cells = places.map(() => []);
  for (const column of columns) {
    const body = el("tbody");
    if (title(column)) body.append(el("tr", {}, el("th", { scope: "rowgroup", colSpan: steps + 1, className: "model" }, title(column))));
    if (!shared) body.append(el("tr", {}, places.map(step => el("th", { scope: "col" }, head(column, step)))));
    body.append(el("tr", {}, places.map(step => {
      const point = pointAt(column, target, step, steps);
      const cell = el("td", { className: point.predicted === target ? "reached" : "", onclick: () => setStep(step) },
        picture(point.png, ""), number(point.confidence), point.predicted === target ? el("span", { className: "hidden" }, ` (${safe(target)})`) : null);
      cells[step].push(cell);
      return cell;
    })));
    table.append(body);
  }
  const scroll = el("div", { className: "film-scroll" }, table);
  if (steps > 7) Object.assign(scroll, { tabIndex: 0, role: "region", ariaLabel: "All budgets" });  // it may scroll
  watching(() => {
    cells.forEach((column, step) => column.forEach(cell => cell.classList.toggle("now", step === state.step)));
    const cell = cells[state.step][0];
    scroll.scrollLeft = cell.offsetLeft + cell.offsetWidth / 2 - scroll.clientWidth / 2;
  });
  scroll.style.setProperty("--cells", steps + 1);
  return scroll;
};

const slider = (steps, text, label) => {
  const input = el("input", { type: "range", min: 0, max: steps, step: 1, "aria-label": label });
  input.style.setProperty("--cells", steps + 1);
  input.addEventListener("input", () => setStep(Number(input.value)));
  watching(() => {
    input.value = state.step;
    input.style.setProperty("--share", steps ? state.step / steps : 0);
    input.setAttribute("aria-valuetext", text());
  });
  return input;
};
const budgetSlider = (columns, target) => slider(state.steps, () => columns.map(column => {
  const point = pointAt(column, target, state.step, state.steps);
  return [title(column), point.eps ? `${size(column.norm)} at most ${six(point.eps)}` : "original",
    `${safe(target)} ${two(point.confidence)}`, `predicted ${safe(point.predicted)}`].filter(Boolean).join(", ");
}).join("; "), "Budget of change");

// Confidence in the target over the budget, with the highest confidence of any class behind it.
const curve = (column, target) => {
  const steps = answerOf(column, target)?.budgets.length ?? 0;
  const points = [...Array(steps + 1).keys()].map(step => pointAt(column, target, step, steps));
  const last = points.at(-1).eps || 1, level = doc.until ?? 0.5, threshold = column.model.threshold, answer = answerOf(column, target);
  const reach = answer && reachOf(column, target);
  const frame = svg("svg", { role: "img", "aria-label": `Confidence in ${safe(target)} over the budget: ` +
    points.map(point => `${six(point.eps)}: ${two(point.confidence)}`).join(", ") });
  const now = svg("g", { class: "now" });
  let x = () => 0, y = () => 0;
  const mark = () => {
    const point = pointAt(column, target, state.step, state.steps);
    now.replaceChildren(svg("line", { x1: x(point.eps), x2: x(point.eps), y1: y(0), y2: y(1) }),
      svg("circle", { cx: x(point.eps), cy: y(point.confidence), r: 6 }));
  };
  const draw = width => {
    const height = Math.round(Math.max(150, Math.min(260, width * 0.54))), left = 30, right = 8, top = 22, bottom = 36;
    x = eps => left + eps / last * (width - left - right);
    y = p => top + (1 - p) * (height - top - bottom);
    const path = value => "M" + points.map(point => `${x(point.eps).toFixed(1)} ${y(value(point)).toFixed(1)}`).join("L");
    const text = (content, attributes) => { const node = svg("text", attributes); node.textContent = content; return node; };
    frame.setAttribute("viewBox", `0 0 ${width} ${height}`);
    frame.setAttribute("width", width);
    frame.setAttribute("height", height);
    frame.replaceChildren(
      ...[0, 1].map(p => svg("line", { class: "rule", x1: left, x2: width - right, y1: y(p), y2: y(p) })),
      svg("line", { class: "half", x1: left, x2: width - right, y1: y(level), y2: y(level) }),
      text("confidence", { x: 0, y: 11 }), text(`size of the change, ${size(column.norm)}`, { x: width - right, y: height - 3, "text-anchor": "end" }),
      ...["0", "0.5", "1"].map(p => text(p, { x: left - 6, y: y(Number(p)) + 4, "text-anchor": "end" })));
    const taken = [], order = [points.length - 1, ...points.keys()];  // the largest radius first; then from 0
    order.slice(0, points.length).forEach(index => {
      const point = points[index], label = radius(column, point.eps), size = 7 * label.length;
      const from = x(point.eps) - (index === points.length - 1 && index ? size : size / 2);
      if (taken.every(([start, end]) => from + size + 8 < start || end + 8 < from)) {
        taken.push([from, from + size]);
        frame.append(text(label, { x: x(point.eps), y: height - 19, "text-anchor": index === points.length - 1 && index ? "end" : "middle" }));
      }
    });
    if (threshold != null) frame.append(svg("line", { class: "threshold", x1: left, x2: width - right, y1: y(threshold), y2: y(threshold) }));
    if (reach?.eps) frame.append(svg("path", { class: "flip", d: `M${x(reach.eps).toFixed(1)} ${y(0)}l-5 8h10z` }));
    frame.append(svg("path", { class: "highest", d: path(point => Math.max(...point.probabilities)) }),
      svg("path", { class: "target", d: path(point => point.confidence) }), now,
      ...points.map(point => svg("circle", { class: point.predicted === target ? "dot reached" : "dot", cx: x(point.eps), cy: y(point.confidence), r: 3 })));
    mark();
  };
  const box = el("div", { className: "plot" }, frame);
  box.addEventListener("click", event => {
    const wanted = event.clientX - frame.getBoundingClientRect().left;
    const nearest = points.reduce((best, point, index) => Math.abs(x(point.eps) - wanted) < Math.abs(x(points[best].eps) - wanted) ? index : best, 0);
    setStep(Math.round(nearest / Math.max(steps, 1) * state.steps));
  });
  new ResizeObserver(() => { if (box.clientWidth) draw(box.clientWidth); }).observe(box);
  draw(320);
  watchers.push(mark);
  const key = (kind, ...label) => el("span", { className: "key" }, el("i", { className: kind }), ...label);
  return el("figure", { className: "curve" }, box, el("figcaption", {}, key("target", safe(target)), key("highest", "highest of any class"),
    doc.until == null ? null : key("half", "requested ", number(doc.until)),
    threshold != null ? key("threshold", "OOD below ", number(threshold)) : null,
    reach?.eps ? key("flip", radiusName(reach), number(reach.eps, three), reach.ood ? " (OOD)" : "") : null));
};

// All classes, or the most relevant ones where there are many, in a fixed order.
const bars = (column, target) => {
  const { labels } = column.model, { original } = column.entry;
  const peaks = labels.map((_, k) => Math.max(original.probabilities[k], ...(answerOf(column, target)?.budgets ?? []).map(b => b.probabilities[k])));
  let chosen = labels.map((_, k) => k);
  if (labels.length > 12) {
    const best = [...chosen].sort((a, b) => peaks[b] - peaks[a]).slice(0, 10);
    chosen = chosen.filter(k => best.includes(k) || labels[k] === target || labels[k] === original.label);
  }
  const rows = chosen.map(k => {
    const fill = el("i", { className: "fill" }), before = el("i", { className: "before" }), value = el("span", { className: "value" });
    before.style.left = `${original.probabilities[k] * 100}%`;
    const row = el("li", {}, el("span", { className: "label", textContent: safe(labels[k]), title: safe(labels[k]) }),
      el("span", { className: "track", "aria-hidden": "true" }, fill, before), value);
    watching(() => {
      const point = pointAt(column, target, state.step, state.steps), p = point.probabilities[k];
      fill.style.width = `${p * 100}%`;
      value.replaceChildren(number(p));
      row.className = (labels[k] === target ? "target " : "") + (labels[k] === point.predicted ? "predicted" : "");
    });
    return row;
  });
  const rest = labels.length - chosen.length;
  return [el("ul", { className: "bars", "aria-label": "Confidence by class" }, rows), el("p", { className: "quiet key" }, el("i", { className: "mark" }),
    "in the original", rest ? `; ${rest} more classes are not shown` : "")];
};

const facts = (column, target) => {
  const answer = answerOf(column, target), list = el("dl", { className: "facts" });
  watching(() => {
    const point = pointAt(column, target, state.step, state.steps);
    list.replaceChildren(...["1", "1.5", "2", "inf"].map(norm => el("div", { className: norm === column.norm ? "own" : "" },
      el("dt", { textContent: size(norm) }), el("dd", {}, point.distance ? number(point.distance["l" + norm], three) : "–",
        norm === column.norm && point.eps ? el("span", { className: "quiet" }, " of ", number(point.eps, six)) : null))));
  });
  const flip = answer?.flip_png && answer.flip_eps ? el("figure", { className: "flip" },
    picture(answer.flip_png, `The nearest picture found that ${doc.until == null ? "is predicted" : "reaches"} ${safe(target)}`),
    el("figcaption", {}, el("b", { textContent: doc.until == null ? "Flip radius" : "Confidence reached" }), answer.flip_is_ood ? [" ", oodTag()] : null, el("br"),
      size(column.norm), " ", number(answer.flip_eps, three), el("br"), el("span", { className: "quiet", textContent: `the smallest change found that ${doc.until == null ? "is predicted" : "reaches"} ${safe(target)}; an upper bound` }))) : null;
  return el("div", { className: "measures" }, el("h3", { textContent: "Size of the change" }), list, flip);
};

// --- the change itself --------------------------------------------------------------------------------------

const pixelsOf = new Map();  // name -> promise of RGBA bytes
const pixels = name => {
  if (!pixelsOf.has(name)) pixelsOf.set(name, (async () => {
    const image = el("img", { src: source(name) });
    await image.decode();
    const canvas = el("canvas", { width: image.naturalWidth, height: image.naturalHeight });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    return context.getImageData(0, 0, canvas.width, canvas.height);
  })());
  return pixelsOf.get(name);
};

// Black through violet and orange to pale yellow, with evenly increasing lightness.
const HEAT = [[0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21], [250, 193, 39], [252, 255, 164]];
const heat = share => {
  const place = Math.min(share, 1) * (HEAT.length - 1), low = Math.min(Math.floor(place), HEAT.length - 2);
  return HEAT[low].map((value, channel) => value + (HEAT[low + 1][channel] - value) * (place - low));
};
const drawings = {
  signed: (after, before, gain) => [0, 1, 2].map(c => 128 + gain * (after[c] - before[c]) / 2),
  size: (after, before, gain) => heat(gain * Math.max(...[0, 1, 2].map(c => Math.abs(after[c] - before[c]))) / 255),
};

const change = (column, target, kind) => {
  const canvas = el("canvas", { role: "img" });
  const name = { signed: "What changed", size: "Where it changed" }[kind];
  const alt = () => {
    const point = pointAt(column, target, state.step, state.steps);
    return `${name}${point.distance ? `, largest ${three(point.distance.linf)} of 1 in a channel` : ": none"}, shown ${six(state.gain)} times`;
  };
  watching(async () => {
    const wanted = [pointAt(column, target, state.step, state.steps).png, state.gain].join();
    if (canvas.dataset.wanted === wanted) return;
    canvas.dataset.wanted = wanted;
    canvas.setAttribute("aria-label", alt());
    const { gain } = state, [before, after] = await Promise.all([column.entry.input_png, wanted.slice(0, wanted.lastIndexOf(","))].map(pixels));
    if (canvas.dataset.wanted !== wanted) return;  // the slider has moved on
    canvas.width = before.width;
    canvas.height = before.height;
    sized(canvas, before.width);
    const image = new ImageData(before.width, before.height);
    for (let at = 0; at < image.data.length; at += 4) {
      image.data.set(drawings[kind](after.data.subarray(at, at + 3), before.data.subarray(at, at + 3), gain), at);
      image.data[at + 3] = 255;
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.dataset.drawn = wanted;
    refreshEnlarged();
  });
  const legend = kind === "signed" ? "gray: unchanged; lighter: increased; darker: decreased, per color channel"
    : "largest change over the color channels";
  const ramp = el("i", { className: "ramp" }), ends = el("span", { className: "ends scale" });
  ramp.style.background = `linear-gradient(to right, ${kind === "signed" ? "#000, #808080, #fff" : HEAT.map(color => `rgb(${color})`)})`;
  watching(() => {
    const full = three(1 / state.gain), more = (pointAt(column, target, state.step, state.steps).distance?.linf ?? 0) * state.gain > 1.001;
    ends.replaceChildren(...(kind === "signed" ? [`${more ? "≤ " : ""}−${full}`, "0", `${more ? "≥ " : ""}+${full}`] : ["0", `${more ? "≥ " : ""}${full}`])
      .map(textContent => el("span", { textContent })));
  });
  const named = title(column) ? `, ${title(column)}` : "";
  return el("figure", { className: `picture difference ${kind}` }, canvas,
    el("figcaption", {}, el("span", { className: "what" }, name, enlarge(`${name.toLowerCase()}${named}`, () => canvas.toDataURL(), alt)),
      ramp, ends, el("span", { className: "line quiet", textContent: legend })));
};

const gainControl = () => {
  const value = el("span", { className: "scale" }), input = el("input", { type: "range", id: "gain", min: 1, max: 32, step: 1 });
  input.addEventListener("input", () => { state.gain = Number(input.value); redraw(); });
  watching(() => {
    input.value = state.gain;
    input.style.setProperty("--share", (state.gain - 1) / 31);
    input.setAttribute("aria-valuetext", `${state.gain} times`);
    value.textContent = `× ${state.gain}`;
  });
  return el("div", { className: "gain" }, el("label", { for: "gain" }, "Difference amplification ", value), input);
};
// The largest change of the largest budgets fills the scale, or three times the typical one (the mean of the
// changes weighted by themselves) where a few pixels dominate.
const fittingGain = (columns, target) => {
  const largest = Math.max(0, ...columns.map(column => {
    const far = answerOf(column, target)?.budgets.at(-1)?.distance;
    return far?.l1 ? Math.min(far.linf, 3 * far.l2 ** 2 / far.l1) : 0;
  }));
  return largest ? Math.max(1, Math.min(32, Math.floor(1 / largest))) : 1;
};

// --- tools --------------------------------------------------------------------------------------------------

// The document is in the page, so that its link works wherever the page is.
const downloadsJson = link => {
  Object.assign(link, { download: "counterfactuals.json", href: "#", onclick: () => {
    link.href = "data:application/json;charset=utf-8," + encodeURIComponent(byId("document").textContent);
  } });
  return link;
};
const stop = () => { clearInterval(playing); playing = null; };
const tools = (columns, target) => {
  const hold = el("button", { type: "button", textContent: "Hold to compare", title: "Or hold space" });
  holding(hold);
  const play = el("button", { type: "button", onclick: () => {
    if (playing) stop();
    else playing = setInterval(() => setStep(state.step === state.steps ? 0 : state.step + 1), 700);
    redraw();
  } });
  const smooth = el("button", { type: "button", textContent: "Smooth", title: "Interpolate between pixels", onclick: () => {
    document.documentElement.classList.toggle("smooth");
    redraw();
  } });
  const save = columns.map(column => el("a", { className: "button" }, title(column) ? `PNG, ${title(column)}` : "PNG"));
  const numbers = downloadsJson(el("a", { className: "button", textContent: "JSON" }));
  watching(() => {
    hold.setAttribute("aria-pressed", state.flipped);
    play.textContent = playing ? "Pause" : "Play";
    smooth.setAttribute("aria-pressed", document.documentElement.classList.contains("smooth"));
    columns.forEach((column, index) => {
      const name = pointAt(column, target, state.step, state.steps).png;
      save[index].href = source(name);
      save[index].download = [...safe(name).split("/").slice(0, -1), safe(name).split("/").at(-1)].join("-");
      save[index].setAttribute("aria-label", `Download ${save[index].download}`);
    });
    numbers.setAttribute("aria-label", "Download all numbers as JSON");
  });
  return el("div", { className: "tools", role: "group", "aria-label": "View and download" }, hold, play, smooth,
    el("span", { className: "spring" }), el("span", { className: "quiet", textContent: "Download" }), save, numbers);
};

const tabs = (group, chosen) => {
  const targets = targetsOf(group);
  if (targets.length === 1) return null;
  const list = el("div", { className: "tabs", role: "tablist", "aria-label": "Target class" }, targets.map((target, index) => el("button", {
    type: "button", role: "tab", id: `tab-${index}`, "aria-selected": target === chosen, "aria-controls": "panel",
    tabIndex: target === chosen ? 0 : -1, textContent: safe(target), onclick: () => { go(state.group, target); byId(`tab-${index}`).focus(); },
  })));
  list.addEventListener("keydown", event => {
    const at = targets.indexOf(state.target), last = targets.length - 1;
    const to = { ArrowRight: at === last ? 0 : at + 1, ArrowLeft: at ? at - 1 : last, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    go(state.group, targets[to]);
    byId(`tab-${to}`).focus();
  });
  return list;
};

const showDetail = () => {
  const group = groups[state.group], target = state.target, view = byId("detail"), columns = columnsOf(group, target);
  state.steps = stepsOf(group, target);
  state.step = Math.min(state.step, state.steps);
  state.gain = fittingGain(columns, target);
  const inputs = [...new Set(columns.map(column => extra.files[column.entry.input_png]))]
    .map(file => columns.filter(column => extra.files[column.entry.input_png] === file));
  const models = new Set(columns.map(column => column.model)).size;
  const to = (index, text) => index in groups ? el("a", { className: "button", href: `#${index + 1}`, textContent: text }) : null;
  const panel = el("div", { id: "panel", className: columns.length === 1 ? "stage one" : "stage many" });
  panel.style.setProperty("--columns", columns.length);
  if (targetsOf(group).length > 1) {
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", `tab-${targetsOf(group).indexOf(target)}`);
  }
  const each = (area, make) => columns.map((column, index) => {
    const node = el("div", { className: `cell ${area}` }, make(column));
    node.style.setProperty("--column", index + 1);
    return node;
  });
  const heading = (level, column) => title(column) ? el(level, { className: "model", textContent: title(column) }) : null;
  panel.append(
    el("div", { className: inputs.length > 1 ? "cell originals several" : "cell originals" }, inputs.map(originalFigure)),
    ...each("pictures", column => counterfactualFigure(column, target)),
    el("div", { className: "cell control" }, film(columns, target), budgetSlider(columns, target), tools(columns, target)),
    el("div", { className: "cell legend" }, el("h3", { textContent: "Confidence" }), el("p", { className: "quiet",
      textContent: "In the target over the budget, and in every class." })),
    ...each("reading", column => [heading("h3", column) ?? el("h3", { textContent: "Confidence" }), curve(column, target), bars(column, target)].flat()),
    el("div", { className: "cell gaining" }, gainControl()),
    ...each("change", column => [heading("h3", column), el("div", { className: "pair" }, change(column, target, "signed"), change(column, target, "size"))]),
    ...each("fact", column => [facts(column, target)]));
  view.replaceChildren(...[
    groups.length > 1 ? el("nav", { className: "tools", "aria-label": "Images" }, el("a", { className: "button", href: "#", textContent: "All images" }),
      el("span", { className: "spring" }), el("span", { className: "quiet" }, `${state.group + 1} of ${groups.length}`),
      to(state.group - 1, "Previous"), to(state.group + 1, "Next")) : null,
    el("div", { className: "headline" }, el("h2", { id: "detail-title", tabIndex: -1, textContent: stem(group.path) }),
      el("p", { className: "quiet path" }, safe(group.path), ...[...new Set(columns.flatMap(column => column.notes))].map(note => ` · ${safe(note)}`)),
      columns.flatMap(column => lead(column, target))),
    tabs(group, target), panel].filter(Boolean));
  document.title = `${stem(group.path)}: ${safe(target)}`;
};

// --- enlarged -----------------------------------------------------------------------------------------------

let refreshEnlarged = () => {};
const openEnlarged = (what, draw, alt) => {
  const dialog = byId("enlarged"), image = el("img", { draggable: false });
  const caption = el("p", { "aria-live": "polite" });
  const smooth = el("button", { type: "button", textContent: "Smooth", onclick: () => { document.documentElement.classList.toggle("smooth"); redraw(); } });
  const refresh = refreshEnlarged = () => {
    image.src = draw();
    image.alt = caption.textContent = alt();
    smooth.setAttribute("aria-pressed", document.documentElement.classList.contains("smooth"));
  };
  image.onload = () => sized(image, image.naturalWidth);
  holding(image);
  watchers.push(refresh);
  dialog.onclose = () => {
    watchers = watchers.filter(watch => watch !== refresh);
    refreshEnlarged = () => {};
    dialog.replaceChildren();
  };
  dialog.setAttribute("aria-label", `Enlarged: ${what}`);
  dialog.replaceChildren(image, el("div", { className: "tools" }, caption, el("span", { className: "spring" }), smooth,
    el("button", { type: "button", textContent: "Close", onclick: () => dialog.close() })));
  refresh();
  dialog.showModal();
  dialog.focus();  // not a button, so that space compares
};

// --- the overview -------------------------------------------------------------------------------------------

const filters = { label: "", target: "", ood: "", order: "" };
const orders = {  // sort keys, ascending
  least: (group, target) => Math.min(...columnsOf(group, target).map(column => reachOf(column, target)?.eps ?? Infinity)),
  unsure: group => Math.min(...group.columns.map(column => column.entry.original.confidence)),
};
const showOverview = () => {
  const view = byId("overview");
  state.steps = most;
  const options = pairs => pairs.map(([value, textContent]) => el("option", { value, textContent }));
  const any = (values, all) => options([["", all], ...values.map(value => [value, safe(value)])]);
  const select = (key, label, offered) => {
    const node = el("select", { id: `filter-${key}`, onchange: () => { filters[key] = node.value; fill(); } }, offered);
    node.value = filters[key];
    return el("label", { for: `filter-${key}` }, label, " ", node);
  };
  const labels = [...new Set(groups.flatMap(group => group.columns.map(column => column.entry.original.label)))].sort();
  const targets = [...new Set(groups.flatMap(targetsOf))];
  const count = el("p", { className: "quiet", role: "status" }), list = el("ul", { className: "cards" });
  list.style.setProperty("--thumbs", 1 + Math.max(...groups.map(group => group.columns.length)));
  const control = el("div", { className: "overview-slider" }), reach = el("span", { className: "scale" });
  const ladders = new Set(groups.flatMap(({ columns }) => columns.flatMap(({ entry, norm }) =>
    entry.targets.map(answer => JSON.stringify([norm, answer.budgets.map(budget => budget.eps)])))));
  const reached = () => {  // the budget in words, where all images have the same budgets
    if (!state.step) return ["original"];
    const [norm, ladder] = ladders.size === 1 ? JSON.parse([...ladders][0]) : [];
    return ladder ? [size(norm), " ≤ ", number(ladder[state.step - 1], six)] : [`budget ${state.step} of ${most}`];
  };
  const card = (group, index) => {
    const target = filters.target || targetsOf(group)[0], steps = stepsOf(group, target);
    const columns = columnsOf(group, target);
    const enough = column => {
      const reach = reachOf(column, target), already = doc.until == null ? "predicted in the original" : "reached in the original";
      if (!reach) return "";
      if (!reach.eps) return el("span", { className: "quiet" }, already);
      return el("span", { className: "quiet" }, radiusName(reach), size(column.norm), " ", number(reach.eps, three), reach.ood ? " (OOD)" : "");
    };
    const images = columns.map(column => ({ column, image: el("img", { alt: "", draggable: false }), value: el("span", { className: "line" }) }));
    watching(() => {
      for (const { column, image, value } of images) {
        const point = pointAt(column, target, Math.round(state.step / Math.max(most, 1) * steps), steps);
        if (image.dataset.name !== point.png) image.src = source(image.dataset.name = point.png);
        value.replaceChildren(norms.size > 1 ? `${size(column.norm)}: ` : "", labeled(target, point.confidence, point.predicted === target), " ", enough(column));
      }
    });
    const { entry } = columns[0];
    // Below each model's name, once, what it predicts for the original and what its counterfactuals reach.
    const said = [...new Set(columns.map(column => column.model))].map(model => {
      const own = images.filter(one => one.column.model === model);
      return [names.length > 1 ? el("span", { className: "line model" }, names[own[0].column.entry.model]) : null,
        el("span", { className: "saw quiet" }, prediction(own[0].column, "predicted ")), ...own.map(one => one.value)];
    });
    const many = columns.length > 1, small = text => many ? el("span", { className: "quiet small" }, text) : null;
    return el("li", {}, el("a", { href: `#${index + 1}/${encodeURIComponent(target)}` },
      el("span", { className: "thumbs" }, el("span", {}, picture(entry.input_png, ""), small("original")),
        images.map(({ image, column }) => el("span", {}, image, small(title(column))))),
      el("b", { className: "name", textContent: stem(group.path) }), ...said.flat()));
  };
  const fill = () => {
    watchers = [];
    control.replaceChildren(el("span", { className: "quiet", "aria-hidden": "true", textContent: "Budget" }), slider(most, () => reached().map(part => part.textContent ?? part).join(""), "Budget of change, all images"), reach);
    watching(() => reach.replaceChildren(...reached()));
    const fitting = groups.map((group, index) => [group, index]).filter(([group]) =>
      (!filters.label || group.columns.some(column => column.entry.original.label === filters.label)) &&
      (!filters.target || targetsOf(group).includes(filters.target)) &&
      (!filters.ood || group.columns.some(column => column.entry.original.is_ood === (filters.ood === "yes"))));
    const by = orders[filters.order], key = ([group]) => by(group, filters.target || targetsOf(group)[0]);
    if (by) fitting.sort((a, b) => key(a) === key(b) ? 0 : key(a) - key(b));
    list.replaceChildren(...fitting.map(([group, index]) => card(group, index)));
    count.textContent = `${fitting.length} of ${groups.length} images`;
  };
  view.replaceChildren(el("h2", { id: "overview-title", tabIndex: -1, textContent: `${groups.length} images` }),
    el("div", { className: "tools" }, select("label", "Predicted", any(labels, "any class")), select("target", "Target", any(targets, "first requested")),
      groups.some(group => group.columns.some(column => column.entry.original.is_ood != null))
        ? select("ood", "Out of distribution", options([["", "any"], ["yes", "yes"], ["no", "no"]])) : null,
      select("order", "Order", options([["", "as given"], ["least", "smallest radius"], ["unsure", "lowest confidence"]])),
      el("span", { className: "spring" }), count), control, list);
  fill();
  document.title = `Counterfactuals of ${groups.length} images`;
};

// --- location: #3/dog is the third image with the target dog, an empty fragment the overview ------------------------------

const go = (group, target) => {
  state.target = target;
  history.replaceState(null, "", `#${group + 1}/${encodeURIComponent(target)}`);
  show();
};
const show = () => {
  stop();
  watchers = [];
  byId("enlarged").close();
  const [place, name] = location.hash.slice(1).split("/");
  const index = groups.length === 1 ? 0 : Number(place) - 1;
  state.group = groups[index] ? index : null;
  byId("overview").hidden = state.group !== null || groups.length < 2;
  byId("detail").hidden = state.group === null;
  if (state.group === null) {
    byId("detail").replaceChildren();
    if (groups.length > 1) showOverview();
    return;
  }
  byId("overview").replaceChildren();
  const targets = targetsOf(groups[state.group]);
  let wanted = name ?? "";
  try { wanted = decodeURIComponent(wanted); } catch { /* a malformed link */ }
  state.target = targets.includes(wanted) ? wanted : targets.includes(state.target) ? state.target : targets[0];
  showDetail();
};
addEventListener("hashchange", () => {
  show();
  scrollTo(0, 0);
  byId(state.group === null ? "overview-title" : "detail-title")?.focus({ preventScroll: true });
});

// Arrows move the budget and space holds the comparison unless the focused control uses these keys.
addEventListener("keydown", event => {
  if (state.group === null || event.altKey || event.ctrlKey || event.metaKey) return;
  const control = event.target.closest?.("a, button, select, input, summary, [tabindex='0']");
  if (event.key === " " && (!control || control.type === "range")) { event.preventDefault(); setFlipped(true); }
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by && !(control && (control.type === "range" || control.matches("select, .scroll")))) { event.preventDefault(); setStep(state.step + by); }
});
addEventListener("keyup", event => { if (event.key === " " || event.key === "Enter") setFlipped(false); });

// --- start --------------------------------------------------------------------------------------------------

const dark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const remembered = value => {
  try { return value ? localStorage.setItem("theme", value) : localStorage.getItem("theme"); } catch { return null; }
};
const theme = byId("theme"), label = () => { theme.textContent = dark() ? "Light" : "Dark"; theme.setAttribute("aria-label", `Switch to ${dark() ? "light" : "dark"} colors`); };
if (["light", "dark"].includes(remembered())) document.documentElement.dataset.theme = remembered();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
theme.onclick = () => { remembered(document.documentElement.dataset.theme = dark() ? "light" : "dark"); label(); };
theme.hidden = false;
label();

downloadsJson(byId("json"));
for (const node of document.querySelectorAll("[data-key]")) {
  const value = doc.models[node.dataset.model][node.dataset.key];
  node.append(value == null ? "no threshold" : number(value, node.dataset.key === "threshold" ? two : three));
}
show();
