"use strict";
// The page of `ratioctl serve`. Text from outside reaches it through textContent only. The result is shown by
// the explorer, which is the page that `ratioctl counterfactual` writes, in a frame.

const byId = id => document.getElementById(id);
const el = (tag, properties = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties))
    if (key.includes("-") || key === "role") node.setAttribute(key, value);
    else node[key] = value;
  node.append(...children.flat().filter(child => child != null));
  return node;
};
// A confidence is never rounded to 0 or 1.
const two = p => 0 < p && p < 0.005 ? "<0.01" : 0.995 <= p && p < 1 ? ">0.99" : p.toFixed(2);
const six = x => String(Number(x.toPrecision(6)));
const norms = { 1: "l₁", 1.5: "l₁.₅", 2: "l₂", inf: "l∞" };
const ACCEPT = "image/png,image/jpeg,image/webp,image/gif,image/bmp,image/tiff,.ppm,.pgm,.pbm,.dcm";

const state = { models: [], limits: {}, file: null, url: null, turn: 0, job: null, stop: null, made: [], box: null };

// --- the server -----------------------------------------------------------------------------------------

const stored = (key, value, store) => {
  try { return value === undefined ? store.getItem(key) : store.setItem(key, value); } catch { return null; }
};
const api = async (path, options = {}) => {
  const token = stored("token", undefined, sessionStorage);
  const headers = token ? { Authorization: `Bearer ${token}`, ...options.headers } : options.headers;
  let answer;
  try { answer = await fetch(path, { ...options, headers }); } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached. Check that it still runs.");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) askForToken();
  const problem = await answer.json().catch(() => null);
  throw new Error(problem?.error?.message ?? `The server answered ${answer.status}.`);
};
const show = error => {
  byId("error").hidden = !error;
  byId("error").textContent = error ? error.message : "";
};
const say = text => { byId("said").textContent = text; };

const askForToken = () => {
  byId("token-form").hidden = false;
  byId("work").hidden = true;
  byId("token").focus();
};
byId("token-form").onsubmit = event => {
  event.preventDefault();
  stored("token", byId("token").value, sessionStorage);
  byId("token-form").hidden = true;
  start();
};

// --- the image ------------------------------------------------------------------------------------------

const take = async files => {
  const [file] = files;
  if (!file) return;
  show(null);
  if (file.size > state.limits.max_body) {
    show(new Error(`${file.name}: has ${file.size} bytes, more than the ${state.limits.max_body} that this server accepts. Make it smaller.`));
    return;
  }
  await cancel();
  const turn = ++state.turn;
  if (state.url) URL.revokeObjectURL(state.url);
  Object.assign(state, { file, url: URL.createObjectURL(file) });
  setBox(null);
  byId("result").hidden = true;
  const image = byId("shown");
  image.alt = `The image ${file.name || "from the clipboard"}`;
  image.src = state.url;
  byId("photo").hidden = false;
  const readable = await image.decode().then(() => true, () => false);
  if (turn !== state.turn) return;
  byId("canvas").hidden = byId("region").hidden = !readable;
  byId("canvas").classList.toggle("small", image.naturalWidth < 256);
  if (readable) {
    const side = Math.min(image.naturalWidth, image.naturalHeight);
    place(byId("square"), [Math.floor((image.naturalWidth - side) / 2), Math.floor((image.naturalHeight - side) / 2), side, side]);
    byId("square").hidden = image.naturalWidth === image.naturalHeight;
  }
  byId("caption").textContent = [file.name, readable ? `${image.naturalWidth} × ${image.naturalHeight} pixels` : "this browser cannot show it",
    readable && !byId("square").hidden ? "dashed: the square that the models see" : ""].filter(Boolean).join(", ");
  await score(turn);
};

// Position an outline; the box is in pixels of the photograph.
const place = (node, [x, y, w, h]) => {
  const { naturalWidth, naturalHeight } = byId("shown");
  const part = (value, whole) => `${100 * value / whole}%`;
  Object.assign(node.style, { left: part(x, naturalWidth), top: part(y, naturalHeight), width: part(w, naturalWidth), height: part(h, naturalHeight) });
};

for (const id of ["file", "camera"]) {
  byId(id).accept = ACCEPT;
  byId(id).onchange = event => { take([...event.target.files]); event.target.value = ""; };
}
addEventListener("paste", event => take([...event.clipboardData?.files ?? []]));
for (const kind of ["dragenter", "dragover"]) addEventListener(kind, event => { event.preventDefault(); byId("drop").classList.add("over"); });
for (const kind of ["dragleave", "drop"]) addEventListener(kind, () => byId("drop").classList.remove("over"));
addEventListener("drop", event => { event.preventDefault(); take([...event.dataTransfer.files]); });

// --- scores -----------------------------------------------------------------------------------------------

const score = async turn => {
  byId("scores").hidden = false;
  byId("cards").replaceChildren(el("p", { className: "quiet", textContent: "…" }));
  try {
    const rows = await Promise.all(state.models.map(async model => {
      const query = new URLSearchParams({ model: model.name, probabilities: true });
      const answer = await api(`/v1/score?${query}`, { method: "POST", body: state.file, headers: { "Content-Type": "application/octet-stream" } });
      const { rows: [row], threshold } = await answer.json();
      return { model, row, threshold };
    }));
    if (turn !== state.turn) return;
    byId("cards").replaceChildren(...rows.map(card));
    say(rows.map(({ model, row }) => `${model.name}: ${row.label} ${two(row.confidence)}, ${row.is_ood ? "out of distribution" : "in distribution"}`).join("; "));
    offer(rows);
  } catch (error) {
    if (turn !== state.turn) return;
    byId("scores").hidden = byId("explain").hidden = true;
    show(error);
  }
};

const card = ({ model, row, threshold }) => el("div", { className: "prediction" },
  state.models.length > 1 ? el("h3", { className: "model", textContent: model.name }) : null,
  el("p", { className: "lead" }, "Predicted ", el("b", { textContent: row.label }), ` ${two(row.confidence)} `,
    el("span", { className: row.is_ood ? "tag" : "tag known", textContent: row.is_ood ? "out of distribution" : "in distribution" })),
  scale(model, row, threshold), bars(model, row));

// The value that is compared with the thresholds, on their scale.
const scale = (model, row, threshold) => {
  const low = model.score === "msp", value = low ? row.confidence : row.ood_score, stored = Object.entries(model.thresholds);
  const values = [value, threshold, ...stored.map(([, at]) => at)], pad = 0.15 * (Math.max(...values) - Math.min(...values)) || 1;
  const [from, to] = low ? [0, 1] : [Math.min(...values) - pad, Math.max(...values) + pad];
  const part = at => `${100 * Math.max(0, Math.min(1, (at - from) / (to - from)))}%`, shown = low ? two : six;
  const what = low ? "Confidence" : `OOD score (${model.score})`;
  const [named, others] = [true, false].map(own => stored.filter(([, at]) => (at === threshold) === own));
  const said = `${what} ${shown(value)}. Out of distribution ${low ? "below" : "above"} ${shown(threshold)}` +
    (named.length ? ` (${named.map(([name]) => name).join(", ")})` : "") + others.map(([name, at]) => `; ${name}: ${shown(at)}`).join("") + ".";
  const region = el("i", { className: low ? "scale-ood" : "scale-ood high" }), mark = el("i", { className: "scale-mark" });
  region.style.width = low ? part(threshold) : `calc(100% - ${part(threshold)})`;
  mark.style.left = part(value);
  const ticks = stored.map(([, at]) => { const tick = el("i", { className: "scale-tick" }); tick.style.left = part(at); return tick; });
  return el("figure", { className: "scale-figure" },
    el("div", { className: "scale-track", role: "img", "aria-label": said }, region, ticks, mark),
    el("div", { className: "scale-ends", "aria-hidden": "true" }, el("span", { textContent: shown(from) }), el("span", { textContent: shown(to) })),
    el("figcaption", { className: "quiet", textContent: said }));
};

const bars = (model, row) => {
  const best = model.labels.map(label => [label, row[`p:${label}`]]).sort((a, b) => b[1] - a[1]).slice(0, 5);
  return el("ul", { className: "bars", "aria-label": "Largest confidences" }, best.map(([label, p], index) => {
    const fill = el("i", { className: "fill" });
    fill.style.width = `${100 * p}%`;
    return el("li", { className: index ? "" : "predicted" }, el("span", { className: "label", textContent: label, title: label }),
      el("span", { className: "track", "aria-hidden": "true" }, fill), el("span", { className: "value", textContent: two(p) }));
  }));
};

// --- the request --------------------------------------------------------------------------------------------

const able = () => state.models.filter(model => model.explains);
const offer = rows => {
  byId("explain").hidden = false;
  byId("form").hidden = !able().length;
  byId("no-explain").hidden = able().length > 0;
  byId("no-explain").textContent = state.models[0].why_not ?? "";
  if (!able().length) return;
  const { row } = rows.find(({ model }) => model.explains), labels = [...new Set(able().flatMap(model => model.labels))];
  const second = able()[0].labels.filter(label => label !== row.label).sort((a, b) => row[`p:${b}`] - row[`p:${a}`])[0];
  const before = byId("target").value;
  byId("target").replaceChildren(...labels.map(label => el("option", { value: label, textContent: label })));
  byId("target").value = before && before !== row.label ? before : second ?? labels[0];
};

const fields = ["x", "y", "w", "h"].map(byId);
const setBox = box => {
  state.box = box;
  byId("box").hidden = !box;
  if (box) place(byId("box"), box);
  fields.forEach((field, index) => { field.value = box ? box[index] : ""; });
};
for (const field of fields) field.onchange = () => {
  const { naturalWidth, naturalHeight } = byId("shown"), [x, y, w, h] = fields.map(one => Math.round(Number(one.value)));
  if (fields.some(one => one.value === "")) return;
  const left = Math.min(Math.max(x, 0), naturalWidth - 1), top = Math.min(Math.max(y, 0), naturalHeight - 1);
  setBox([left, top, Math.min(Math.max(w, 1), naturalWidth - left), Math.min(Math.max(h, 1), naturalHeight - top)]);
};
byId("clear").onclick = () => setBox(null);
byId("draw").onclick = () => {
  const on = byId("draw").getAttribute("aria-pressed") !== "true";
  byId("draw").setAttribute("aria-pressed", on);
  byId("canvas").classList.toggle("drawing", on);
};
{
  let from = null;
  const at = event => {
    const image = byId("shown"), place = image.getBoundingClientRect();
    const part = (value, size) => Math.max(0, Math.min(1, value / size));
    return [Math.round(part(event.clientX - place.left, place.width) * image.naturalWidth), Math.round(part(event.clientY - place.top, place.height) * image.naturalHeight)];
  };
  const canvas = byId("canvas");
  canvas.addEventListener("dragstart", event => event.preventDefault());
  canvas.addEventListener("pointerdown", event => {
    if (!canvas.classList.contains("drawing") || event.button !== 0) return;
    from = at(event);
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", event => {
    if (!from) return;
    const to = at(event), [x, y] = [0, 1].map(axis => Math.min(from[axis], to[axis]));
    const [w, h] = [0, 1].map(axis => Math.abs(from[axis] - to[axis]));
    if (w && h) setBox([x, y, w, h]);
  });
  for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, () => { from = null; });
}

// --- the search ---------------------------------------------------------------------------------------------

const searching = on => {
  byId("go").disabled = on;
  byId("cancel").hidden = !on;
  byId("running").hidden = !on;
  if (on) { byId("progress").value = 0; byId("previews").replaceChildren(); byId("state").textContent = "Waiting"; }
};
const cancel = async () => {
  const { job, stop } = state;
  Object.assign(state, { job: null, stop: null });
  stop?.abort();
  searching(false);
  if (job) await api(`/v1/counterfactual/${job}`, { method: "DELETE" }).catch(() => {});
};
byId("cancel").onclick = async () => { await cancel(); say("Cancelled"); byId("go").focus(); };

byId("form").onsubmit = async event => {
  event.preventDefault();
  await cancel();
  show(null);
  const stop = state.stop = new AbortController(), { signal } = stop, target = byId("target").value, norm = byId("norm").value;
  const query = new URLSearchParams({ target, norm });
  for (const model of able()) if (model.labels.includes(target)) query.append("model", model.name);
  if (state.box) { query.set("region", state.box.join()); query.set("region_space", "image"); }
  byId("result").hidden = true;
  searching(true);
  const body = new FormData();
  body.append("image", state.file, state.file.name || "image.png");
  try {
    const { id } = await (await api(`/v1/counterfactual?${query}`, { method: "POST", body, signal })).json();
    if (signal.aborted) { api(`/v1/counterfactual/${id}`, { method: "DELETE" }).catch(() => {}); return; }
    state.job = id;
    say("Searching");
    await follow(id, norm, signal);
    const [page, found] = await Promise.all([api(`/v1/counterfactual/${id}/page`, { signal }), api(`/v1/counterfactual/${id}`, { signal })]);
    await present(await page.text(), (await found.json()).result, id, signal);
    say("The counterfactual has been found");
  } catch (error) {
    if (!signal.aborted) show(error);
  } finally {
    if (state.stop === stop) { Object.assign(state, { job: null, stop: null }); searching(false); }
  }
};

// Follow the server-sent events of a search to its end; a stream that breaks is opened again.
const follow = async (id, norm, signal) => {
  let quarter = 0;
  const handle = (kind, data) => {
    if (kind === "progress") {
      byId("progress").value = data.progress;
      byId("state").textContent = data.state === "queued" ? "Waiting for another search" : `Searching, ${Math.round(100 * data.progress)} %`;
      if (Math.floor(4 * data.progress) > quarter && data.progress < 1) say(`${25 * (quarter = Math.floor(4 * data.progress))} %`);
    } else if (kind === "preview") preview(data, norm);
    else if (kind === "failed") throw Object.assign(new Error(data.error.message), { final: true });
    else if (kind === "cancelled") throw Object.assign(new Error("The search was cancelled."), { final: true });
    return kind === "done";
  };
  for (let tries = 0; ; tries++) {
    try {
      const answer = await api(`/v1/counterfactual/${id}/events`, { signal });
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let text = ""; ;) {
        const { done, value } = await reader.read();
        if (done) break;
        const parts = (text + value).split("\n\n");
        text = parts.pop();
        for (const part of parts) {
          const [, kind, data] = /^event: (\w+)\ndata: (.*)$/s.exec(part) ?? [];
          if (kind && handle(kind, JSON.parse(data))) return;
          tries = 0;
        }
      }
    } catch (error) {
      if (signal.aborted || error.final || tries >= 3) throw error;
    }
    if (tries >= 3) throw new Error("The connection to the server was lost.");
    await new Promise(resolve => setTimeout(resolve, 1000));
  }
};

const preview = (data, norm) => {
  const id = `preview ${data.model} ${data.target}`;
  let figure = byId(id);
  if (!figure) byId("previews").append(figure = el("figure", { id }, el("img", {}), el("figcaption")));
  const [image, caption] = figure.children;
  image.src = `data:image/png;base64,${data.png}`;
  image.alt = `Intermediate picture of the search for ${data.target}`;
  caption.replaceChildren(...(state.models.length > 1 ? [el("span", { className: "line quiet", textContent: data.model })] : []),
    el("b", { textContent: data.target }), ` ${two(data.confidence)} `, el("span", { className: "quiet", textContent: `${norms[norm]} ≤ ${six(data.eps)}` }));
};

// --- the result ---------------------------------------------------------------------------------------------

const present = async (page, result, id, signal) => {
  state.made.forEach(url => URL.revokeObjectURL(url));
  const url = (content, type) => { const made = URL.createObjectURL(new Blob([content], { type })); state.made.push(made); return made; };
  state.made = [];
  const link = (text, href, name) => el("a", { className: "button", textContent: text, href, download: name });
  const stem = (state.file.name || "image").replace(/\.[^.]*$/, ""), address = url(page, "text/html");
  const links = [link("Page (HTML)", address, `${stem}.html`), link("JSON", url(JSON.stringify(result, null, 1), "application/json"), `${stem}.json`)];
  for (const entry of result.images) for (const target of entry.targets) {
    const grid = `${target.budgets[0].png.split("/").slice(0, -1).join("/")}/grid.png`.split("/").map(encodeURIComponent).join("/");
    const png = await (await api(`/v1/counterfactual/${id}/pictures/${grid}`, { signal })).blob();
    const name = result.models.length > 1 ? `, ${result.models[entry.model].name}` : "";
    links.push(link(`PNG${name}`, url(png, "image/png"), `${stem}-${target.target}.png`));
  }
  byId("downloads").replaceChildren(...links);
  const frame = byId("explorer");
  byId("result").hidden = false;
  await new Promise(resolve => { frame.onload = resolve; frame.src = address; });
  const inside = frame.contentDocument;
  inside.querySelector(".top").hidden = true;
  inside.documentElement.dataset.theme = dark() ? "dark" : "light";
  const fit = () => { frame.style.height = `${inside.body.offsetHeight + 2}px`; };
  new frame.contentWindow.ResizeObserver(fit).observe(inside.body);
  fit();
  byId("result-title").focus({ preventScroll: true });
  byId("result").scrollIntoView({ block: "start" });
};

// --- start --------------------------------------------------------------------------------------------------

const dark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const label = () => {
  byId("theme").textContent = dark() ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", `Switch to ${dark() ? "light" : "dark"} colors`);
  const inside = byId("explorer").contentDocument;
  if (inside?.documentElement) inside.documentElement.dataset.theme = dark() ? "dark" : "light";
};
const remembered = stored("theme", undefined, localStorage);  // the explorer's key
if (["light", "dark"].includes(remembered)) document.documentElement.dataset.theme = remembered;
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
byId("theme").onclick = () => { stored("theme", document.documentElement.dataset.theme = dark() ? "light" : "dark", localStorage); label(); };
label();

const start = async () => {
  show(null);
  try {
    const { models, limits, version } = await (await api("/v1/model")).json();
    Object.assign(state, { models, limits });
    byId("served").textContent = models.map(model => model.name).join(", ");
    document.title = `${models.map(model => model.name).join(", ")}: ratioctl`;
    const fact = (term, text) => el("div", {}, el("dt", { textContent: term }), el("dd", { textContent: text }));
    const listed = labels => `${labels.length} classes: ${labels.slice(0, 40).join(", ")}${labels.length > 40 ? ", …" : ""}`;
    byId("facts").replaceChildren(...models.map(model => fact(model.name,
      `${listed(model.labels)}; input ${model.input_size.join(" × ")}; computed by ${model.backend}`)), fact("version", version));
    byId("work").hidden = false;
  } catch (error) { show(error); }
};
const given = /^#token=(.+)$/.exec(location.hash);
if (given) {
  stored("token", decodeURIComponent(given[1]), sessionStorage);
  history.replaceState(null, "", location.pathname);
}
start();
