// What the metrics say, as plain data: no drawing here, so that it runs without a browser.

// Prometheus' text format: name -> [{labels, value}].
export function parseMetrics(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, key, value] of (match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[key] = value.replace(/\\(.)/g, (_, char) => (char === "n" ? "\n" : char));
    }
    if (!found.has(match[1])) found.set(match[1], []);
    found.get(match[1]).push({ labels, value: match[3] === "+Inf" ? Infinity : Number(match[3]) });
  }
  return found;
}

// "model/version" -> its figures.
export function perVersion(metrics) {
  const versions = new Map();
  const at = ({ model, version }) => {
    const key = `${model}/${version}`;
    if (!versions.has(key)) {
      versions.set(key, { model, version, requests: 0, failures: 0, buckets: [], drift: [], right: 0, wrong: 0 });
    }
    return versions.get(key);
  };
  const each = (name, use) => (metrics.get(name) ?? []).forEach(({ labels, value }) => use(at(labels), value, labels));
  each("lepton_inference_requests_total", (one, value) => { one.requests = value; });
  each("lepton_inference_failures_total", (one, value) => { one.failures = value; });
  each("lepton_request_seconds_bucket", (one, value, { le }) => {
    one.buckets.push({ bound: le === "+Inf" ? Infinity : Number(le), count: value });
  });
  each("lepton_drift_psi", (one, value, { feature }) => one.drift.push({ feature, psi: value }));
  each("lepton_feedback_rows_total", (one, value, { result }) => { one[result] = value; });
  return versions;
}

// A quantile of the answers between two looks, as Prometheus' histogram_quantile; null without any.
export function quantile(share, now, before) {
  const counts = now.map(({ bound, count }, index) => ({ bound, count: count - (before?.[index]?.count ?? 0) }));
  const total = counts.at(-1)?.count ?? 0;
  if (!total) return null;
  const rank = share * total;
  let low = 0;
  let below = 0;
  for (const { bound, count } of counts) {
    if (count >= rank) return bound === Infinity ? low : low + ((bound - low) * (rank - below)) / (count - below);
    low = bound;
    below = count;
  }
  return low;
}

// Of some names those that hold a text, in order and at most so many; how many more there are; and whether there are so
// few names that nobody needs to look for one. While a text is there, it must stay to be seen.
export function chosen(names, text, most) {
  const wanted = text.trim().toLowerCase();
  const found = names.filter((name) => name.toLowerCase().includes(wanted)).sort((one, other) => one.localeCompare(other));
  return { shown: found.slice(0, most), more: Math.max(0, found.length - most), few: names.length <= most / 10 && !wanted };
}
