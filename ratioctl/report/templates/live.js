"use strict";
// Searches in the reader's browser. A file of `export --explain` and onnxruntime-web are in the page; results
// join the document of explorer.js, which shows them as it shows all others. Nothing is requested or sent.

{
const WORKER = `
let ort, session;
onmessage = async ({ data }) => {
  try {
    if (data.library) {
      ort = await import(URL.createObjectURL(new Blob([data.library], { type: "text/javascript" })));
      ort.env.wasm.numThreads = 1;  // more need headers that a file does not have
      ort.env.wasm.wasmBinary = data.runtime;
      session = await ort.InferenceSession.create(data.model);
      return postMessage({ ready: true });
    }
    const began = performance.now();
    const found = await session.run({
      image: new ort.Tensor("uint8", data.pixels, data.shape), target: new ort.Tensor("int64", [data.target], [1]),
      radii: new ort.Tensor("float64", data.radii, [data.radii.length]), steps: new ort.Tensor("int64", [data.steps], [1]),
    });
    const outputs = Object.fromEntries(Object.entries(found).map(([name, tensor]) => [name, tensor.data]));
    postMessage({ outputs, seconds: (performance.now() - began) / 1000 });
  } catch (error) {
    postMessage({ error: String(error?.message ?? error) });
  }
};`;
const model = doc.models[0], K = model.labels.length, channels = Number(byId("live").dataset.channels);
const side = Number(byId("live").dataset.side), ladder = JSON.parse(byId("live").dataset.radii);

const unpacked = async name => {
  const packed = Uint8Array.from(atob(byId(`live-${name}`).textContent), c => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
};

let worker = null, fail = () => {};  // `fail` ends what waits for the worker
const answered = message => new Promise((resolve, reject) => {
  fail = reason => reject(new Error(reason));
  worker.onmessage = ({ data }) => data.error ? reject(new Error(data.error)) : resolve(data);
  worker.onerror = event => reject(new Error(event.message ?? "the search could not be started"));
  worker.postMessage(message);
});
const started = async () => {
  if (worker) return;
  worker = new Worker(URL.createObjectURL(new Blob([WORKER], { type: "text/javascript" })));
  await answered({ library: await unpacked("library"), runtime: (await unpacked("runtime")).buffer, model: await unpacked("model") });
};
const stopped = () => { worker?.terminate(); worker = null; };

// --- pictures -----------------------------------------------------------------------------------------------

const surface = () => {
  const canvas = el("canvas", { width: side, height: side });
  return [canvas, canvas.getContext("2d", { willReadFrequently: true })];
};
// The bytes (H, W, C) of RGBA, and back.
const bytesOf = rgba => {
  const bytes = new Uint8Array(side * side * channels);
  for (let k = 0; k < side * side; k++)
    if (channels === 3) for (let c = 0; c < 3; c++) bytes[3 * k + c] = rgba[4 * k + c];
    else bytes[k] = Math.round(0.299 * rgba[4 * k] + 0.587 * rgba[4 * k + 1] + 0.114 * rgba[4 * k + 2]);
  return bytes;
};
const addPicture = (name, bytes) => {
  const [canvas, context] = surface(), image = context.createImageData(side, side);
  for (let k = 0; k < side * side; k++)
    for (let c = 0; c < 4; c++) image.data[4 * k + c] = c === 3 ? 255 : bytes[channels * k + (channels === 3 ? c : 0)];
  context.putImageData(image, 0, 0);
  extra.files[name] = extra.data.push(canvas.toDataURL("image/png").split(",")[1]) - 1;
  return name;
};
// The center square over white, resized by the browser.
const bytesOfFile = async file => {
  const bitmap = await createImageBitmap(file), cut = Math.min(bitmap.width, bitmap.height), [, context] = surface();
  context.fillStyle = "white";
  context.fillRect(0, 0, side, side);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, (bitmap.width - cut) / 2, (bitmap.height - cut) / 2, cut, cut, 0, 0, side, side);
  return bytesOf(context.getImageData(0, 0, side, side).data);
};
const distances = (a, b) => {
  const sums = { l1: 0, "l1.5": 0, l2: 0, linf: 0 };
  a.forEach((value, k) => {
    const d = Math.abs(value - b[k]) / 255;
    sums.l1 += d; sums["l1.5"] += d ** 1.5; sums.l2 += d * d; sums.linf = Math.max(sums.linf, d);
  });
  return { ...sums, "l1.5": sums["l1.5"] ** (2 / 3), l2: Math.sqrt(sums.l2) };
};

// --- a search -----------------------------------------------------------------------------------------------

const largest = row => row.indexOf(Math.max(...row));
const scoresOf = (outputs, row) => Array.from(outputs.probabilities.slice(row * K, (row + 1) * K));
const flagged = row => model.threshold == null ? null : Math.max(...row) < model.threshold;
let searches = 0;

// The target's entry as in counterfactuals.json. Its radii are those of budgets: no smaller ones are searched.
const answerFrom = (outputs, radii, target, input) => {
  const home = `live-${++searches}`, k = model.labels.indexOf(target), n = side * side * channels;
  const budgets = radii.map((eps, row) => {
    const bytes = outputs.counterfactual.slice(row * n, (row + 1) * n), probabilities = scoresOf(outputs, row);
    return { eps, png: addPicture(`${home}/${target}/eps-${eps}.png`, bytes), confidence: probabilities[k],
      confidence_float: outputs.confidence_float[row], predicted: model.labels[largest(probabilities)],
      is_ood: flagged(probabilities), probabilities, distance: distances(bytes, input) };
  });
  const norm = doc.norm === "inf" ? "linf" : `l${doc.norm}`, flip = budgets.find(budget => budget.predicted === target);
  const known = budgets.find(budget => budget.predicted === target && budget.is_ood === false);
  return { target, budgets, flip_eps: flip?.distance[norm] ?? null, flip_png: flip?.png ?? null, flip_confidence: flip?.confidence ?? null,
    flip_is_ood: flip?.is_ood ?? null, in_distribution_eps: known?.distance[norm] ?? null };
};

const addImage = (path, input, outputs) => {
  const probabilities = scoresOf(outputs, 0), label = model.labels[largest(probabilities)];
  const entry = { path, sha256: null, model: 0, input_png: addPicture(`live-${++searches}/input.png`, input), targets: [],
    original: { label, confidence: Math.max(...probabilities), probabilities, is_ood: flagged(probabilities) } };
  return groups.push({ path, columns: [{ entry, norm: String(doc.norm), model, notes: ["cut to the center square and resized by the browser"] }] }) - 1;
};

const search = async ({ chosen, file, target, radii, steps }, report) => {
  report("Loading the model", 0);
  await started();
  const input = file ? await bytesOfFile(file) : bytesOf((await pixels(groups[chosen].columns[0].entry.input_png)).data);
  const given = { pixels: input, shape: [1, side, side, channels], target: model.labels.indexOf(target) };
  // Scoring one image computes five rows, the search as many as this; their times are in proportion.
  const original = await answered({ ...given, radii: [0], steps: 0 });
  const expected = original.seconds * radii.length * (21 + steps) / 5, began = performance.now();
  const clock = setInterval(() => {
    const passed = (performance.now() - began) / 1000;
    report(`Searching: ${passed.toFixed(0)} s of about ${Math.max(expected, passed).toFixed(0)} s`, Math.min(passed / expected, 0.99));
  }, 200);
  try {
    const { outputs, seconds } = await answered({ ...given, radii, steps });
    const index = file ? addImage(file.name, input, original.outputs) : chosen, { entry } = groups[index].columns[0];
    entry.targets = [...entry.targets.filter(answer => answer.target !== target), answerFrom(outputs, radii, target, input)];
    return { index, seconds };
  } finally {
    clearInterval(clock);
  }
};

// --- the form -----------------------------------------------------------------------------------------------

const options = (values, text = safe) => values.map((value, index) => el("option", { value: index, textContent: text(value) }));
const image = el("select", { id: "live-image" }), file = el("input", { id: "live-file", type: "file", accept: "image/*" });
const target = el("select", { id: "live-target" }, options(model.labels));
const radii = el("input", { id: "live-radii", type: "text", value: ladder.join(", "), inputMode: "decimal", size: 24 });
const steps = el("input", { id: "live-steps", type: "number", min: 1, max: 10000, value: 100 });
const button = el("button", { type: "submit", textContent: "Search" });
const cancel = el("button", { type: "button", textContent: "Cancel", hidden: true, onclick: () => { stopped(); fail("Canceled"); } });
const bar = el("progress", { max: 1, value: 0, hidden: true, "aria-label": "Progress of the search" }), status = el("p", { role: "status", className: "quiet" });
const field = (node, text) => el("label", { for: node.id }, text, " ", node);
const own = field(file, "File"), report = (text, share) => { status.textContent = text; bar.value = share; };
const offer = () => {
  image.replaceChildren(...options(groups, group => stem(group.path)), el("option", { value: -1, textContent: "an image of yours" }));
  image.value = state.group ?? (groups.length ? 0 : -1);
  own.hidden = image.value !== "-1";
};
image.onchange = () => { own.hidden = image.value !== "-1"; };

const wanted = () => {
  const values = radii.value.split(",").map(Number), most = (doc.norm === "inf" ? 1 : Math.sqrt(side * side * channels));
  if (!values.every((eps, k) => eps > (values[k - 1] ?? 0) && eps <= most))
    throw new Error(`Radii are numbers above 0 that grow, up to ${three(most)}: for example 0.5, 1, 2.`);
  const mine = image.value === "-1" ? file.files[0] : null;
  if (image.value === "-1" && !mine) throw new Error("Choose a file.");
  return { chosen: Number(image.value), file: mine, target: model.labels[target.value], radii: values, steps: steps.valueAsNumber };
};
const form = el("form", { className: "tools", noValidate: false, onsubmit: async event => {
  event.preventDefault();
  button.disabled = true;
  try {
    const request = wanted();
    cancel.hidden = bar.hidden = false;
    const { index, seconds } = await search(request, report);
    go(index, request.target);
    offer();
    report(`Found in ${seconds.toFixed(1)} s.`, 1);
  } catch (error) {
    report(error.message, 0);
  } finally {
    button.disabled = false;
    cancel.hidden = bar.hidden = true;
  }
} }, field(image, "Image"), own, field(target, "Target"), field(radii, "Radii"), field(steps, "Steps"), button, cancel);
byId("live").append(el("h2", { id: "live-title", textContent: "Search in this browser" }),
  el("p", { className: "quiet", textContent: "The model and the program that searches are in this page: nothing is downloaded or sent." }), form, bar, status);
byId("live").hidden = false;
offer();
}
