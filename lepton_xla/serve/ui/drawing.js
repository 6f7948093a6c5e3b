// Elements of the page. All text is set as text, never as markup.

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const number = (value, digits = 1) =>
  value === null || Number.isNaN(value) ? "-" : value.toLocaleString("en", { maximumFractionDigits: digits });
export const milliseconds = (seconds) => (seconds === null ? "-" : `${number(1000 * seconds, 2)} ms`);
export const percent = (share) => (share === null ? "-" : `${number(100 * share, 2)} %`);
export const bytes = (value) => `${number(value / 2 ** 20, 0)} MiB`;

export function table(caption, columns, rows) {
  const head = make("tr", {}, ...columns.map(([text, kind]) => make("th", { scope: "col", className: kind ?? "" }, text)));
  const body = rows.map((cells) =>
    make("tr", {}, ...cells.map((cell, index) => make("td", { className: columns[index][1] ?? "" }, cell ?? ""))),
  );
  const made = make("table", {}, make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...body));
  return make("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": caption }, made);
}

export function plot(caption, values, show) {
  const known = values.filter((value) => value !== null);
  const most = Math.max(...known, 1e-9);
  const points = values
    .map((value, index) => [(100 * index) / Math.max(values.length - 1, 1), value])
    .filter(([, value]) => value !== null)
    .map(([x, value]) => `${x.toFixed(2)},${(29 - (28 * value) / most).toFixed(2)}`);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 100 30");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${caption}: ${known.length ? show(known.at(-1)) : "no data"} now`);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", points.join(" "));
  svg.append(line);
  const text = known.length ? `${caption}, at most ${show(most)} in the last minutes` : `${caption}: no data yet`;
  return make("figure", {}, svg, make("figcaption", {}, text));
}

export const button = (text, name, act) => make("button", { type: "button", onclick: act, "aria-label": name }, text);
