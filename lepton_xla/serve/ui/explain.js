// Explanations: asks a model NAME-explain what an answer comes from, and draws it over the tokens or the pixels.

import { make, number, table } from "./drawing.js";

const SUFFIX = "-explain";
const MOST = 10; // rows of the table
const ARRAYS = { FP32: Float32Array, INT32: Int32Array, UINT8: Uint8Array };
const FOR = [46, 160, 67], AGAINST = [218, 54, 51];

// Models that have one beside them, or only that.
export const explained = (index) =>
  [...new Set(index.filter(({ name, state }) => name.endsWith(SUFFIX) && (state ?? "READY") === "READY")
    .map(({ name }) => name.slice(0, -SUFFIX.length)))].sort();

const shapeOf = (value) => (Array.isArray(value) ? [value.length, ...shapeOf(value[0])] : []);

// One row of inputs as a request with binary tensors; `bytes` for texts and files, `value` for nested lists.
export function encodeRequest(inputs, target) {
  const parts = [], heads = [];
  for (const { name, datatype, bytes, value } of inputs) {
    if (bytes) {
      const length = new Uint8Array(4);
      new DataView(length.buffer).setUint32(0, bytes.length, true);
      parts.push(length, bytes);
      heads.push({ name, datatype, shape: [1], parameters: { binary_data_size: 4 + bytes.length } });
    } else heads.push({ name, datatype, shape: shapeOf(value), data: value });
  }
  heads.push({ name: "target", datatype: "INT32", shape: [1], data: [target] });
  const head = new TextEncoder().encode(JSON.stringify({ inputs: heads, parameters: { binary_data_output: true } }));
  return { length: head.length, body: new Blob([head, ...parts]) };
}

// Outputs by name: {shape, data}, texts as a list.
export function decodeAnswer(buffer, length) {
  const head = JSON.parse(new TextDecoder().decode(buffer.slice(0, length)));
  const found = new Map();
  let at = length;
  for (const { name, shape, datatype, parameters, data } of head.outputs) {
    const size = parameters?.binary_data_size;
    if (size === undefined) found.set(name, { shape, data });
    else if (datatype === "BYTES") {
      const texts = [], view = new DataView(buffer, at, size);
      for (let place = 0; place < size;) {
        const bytes = view.getUint32(place, true);
        texts.push(new TextDecoder().decode(new Uint8Array(buffer, at + place + 4, bytes)));
        place += 4 + bytes;
      }
      found.set(name, { shape, data: texts });
    } else found.set(name, { shape, data: new ARRAYS[datatype](buffer.slice(at, at + size)) });
    at += size ?? 0;
  }
  return found;
}

// The largest attributions, with where they are, or which token it is.
export function largest(values, shape, words = null) {
  const order = [...values.keys()].sort((one, other) => Math.abs(values[other]) - Math.abs(values[one]));
  return order.slice(0, MOST).map((place) => {
    const at = [];
    let rest = place;
    for (const size of shape.slice(1).toReversed()) {
      at.unshift(rest % size);
      rest = Math.floor(rest / size);
    }
    return { at, word: words?.[place] ?? null, value: values[place] };
  });
}

const most = (values) => values.reduce((found, value) => Math.max(found, Math.abs(value)), 1e-30);

function drawTokens(words, values) {
  let end = words.length;
  while (end > 1 && words[end - 1] === words[end - 2] && values[end - 1] === 0 && values[end - 2] === 0) end -= 1;
  const scale = most(values);
  const line = make("p", { className: "tokens" });
  words.slice(0, end).forEach((word, place) => {
    const span = make("span", { className: values[place] < 0 ? "against" : "for", title: number(values[place], 4) }, word);
    span.style.setProperty("--share", (Math.abs(values[place]) / scale).toFixed(3));
    line.append(span, " ");
  });
  return line;
}

// A picture in gray, green where it speaks for the class and red where against; without one, on black.
function drawPixels(name, attribution, pixels, size) {
  const [, high, wide, channels = 1] = attribution.shape;
  const [height, width] = size ? size.data : [high, wide];
  const sums = new Float32Array(height * width), grays = new Float32Array(height * width);
  for (let row = 0; row < height; row += 1) {
    for (let column = 0; column < width; column += 1) {
      for (let channel = 0; channel < channels; channel += 1) {
        const from = (row * wide + column) * channels + channel;
        sums[row * width + column] += attribution.data[from];
        grays[row * width + column] += pixels ? pixels.data[from] / channels : 0;
      }
    }
  }
  const canvas = make("canvas", { width, height, role: "img", "aria-label": `What speaks for the class in ${name}, and what against` });
  const picture = new ImageData(width, height), scale = most(sums);
  sums.forEach((value, place) => {
    const share = Math.abs(value) / scale, color = value < 0 ? AGAINST : FOR;
    color.forEach((each, channel) => { picture.data[4 * place + channel] = share * each + (1 - share) * grays[place]; });
    picture.data[4 * place + 3] = 255;
  });
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}

function drawAnswer(found) {
  const only = (name) => found.get(name)?.data[0];
  const label = found.has("label") ? ` (${only("label")})` : "";
  const made = [make("p", {}, `Class ${only("target")}${label}, score ${number(only("score"), 4)}; ${number(only("baseline"), 4)} where nothing is there.`)];
  for (const [output, attribution] of found) {
    if (!output.startsWith("attribution/")) continue;
    const name = output.slice("attribution/".length), { shape, data } = attribution;
    const seen = found.get(`seen/${name}`);
    const words = seen && Array.isArray(seen.data) ? seen.data : null;
    if (words) made.push(drawTokens(words, data));
    else if (shape.length === 3 || (shape.length === 4 && shape[3] <= 4)) {
      made.push(drawPixels(name, attribution, seen, found.get(`seen/${name.replace(/\.pixels$/, ".size")}`)));
    }
    const rows = largest(data, shape, words).map(({ at, word, value }) => [word ?? at.join(", "), number(value, 4)]);
    made.push(table(`${name}: what counts most`, [[words ? "Token" : "At"], ["Attribution", "number"]], rows));
  }
  return made;
}

async function valueOf({ name, datatype, shape }, form) {
  const given = form.elements[`text ${name}`].value;
  if (datatype !== "BYTES") {
    try {
      return { name, datatype, value: JSON.parse(given) };
    } catch {
      throw new Error(`${name} is no JSON list of the shape ${shape.map((size) => (size < 0 ? "rows" : size)).join(", ")}`);
    }
  }
  const file = form.elements[`file ${name}`].files[0];
  return { name, datatype, bytes: file ? new Uint8Array(await file.arrayBuffer()) : new TextEncoder().encode(given) };
}

function fields({ name, datatype, shape }) {
  const sizes = shape.map((size) => (size < 0 ? "rows" : size)).join(", ");
  const hint = datatype === "BYTES" ? "text, or a file below" : `JSON list, ${datatype} [${sizes}], one row`;
  const made = [make("label", {}, `${name}: ${hint}`, make("textarea", { name: `text ${name}`, rows: 2 }))];
  if (datatype === "BYTES") made.push(make("label", {}, `File for ${name} `, make("input", { type: "file", name: `file ${name}` })));
  return made;
}

// The form for one of the models; `ask` reads JSON, `post` sends a request with binary tensors and gives the answer.
export async function drawExplain(place, names, ask, post) {
  const pick = make("select", { name: "model" }, ...names.map((name) => make("option", { value: name }, name)));
  const inside = make("div"), answer = make("div", { role: "status" });
  const form = make("form", { className: "card explain" }, make("label", {}, "Model ", pick), inside,
    make("label", {}, "Class (empty: the most likely one) ", make("input", { name: "class", type: "number", min: 0 })),
    make("button", { type: "submit" }, "Explain"));
  let inputs = [];
  const choose = async () => {
    const known = await ask(`/v2/models/${encodeURIComponent(pick.value + SUFFIX)}`);
    inputs = known.inputs.filter(({ name }) => name !== "target");
    inside.replaceChildren(...inputs.flatMap(fields));
    answer.replaceChildren();
  };
  pick.addEventListener("change", choose);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      const given = await Promise.all(inputs.map((input) => valueOf(input, form)));
      const target = form.elements.class.value;
      const { length, body } = encodeRequest(given, target === "" ? -1 : Number(target));
      const sent = await post(`/v2/models/${encodeURIComponent(pick.value)}/explain`, body, { "Inference-Header-Content-Length": length });
      const head = Number(sent.headers.get("Inference-Header-Content-Length"));
      answer.replaceChildren(...drawAnswer(decodeAnswer(await sent.arrayBuffer(), head)));
    } catch (error) {
      answer.replaceChildren(make("p", { className: "bad", role: "alert" }, error.message));
    }
  });
  place.replaceChildren(form, answer);
  await choose();
}
