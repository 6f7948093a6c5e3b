// The page for people: reads the server's own routes every two seconds and draws what they say. All text is set as text,
// never as markup, and nothing is loaded from elsewhere.

import { button, bytes, make, milliseconds, number, percent, plot, table } from "./drawing.js";
import { drawExplain, explained } from "./explain.js";
import { chosen, parseMetrics, perVersion, quantile } from "./figures.js";
import { drawTraffic, isMoving, isRunning } from "./traffic.js";

const POLL_MS = 2000;
const KEPT = 150; // five minutes
const MOST_SHOWN = 50; // models at once
const MOST_SHARED = 20; // of which the traffic is asked for
const TOKEN = "lepton-token";

const byId = (id) => document.getElementById(id);
const history = new Map(); // "model/version" -> [{time, requests, buckets, failures}]
let admin = true; // until the server refuses a change

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function send(path, method, body, headers) {
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers.Authorization = `Bearer ${token}`;
  const answer = await fetch(path, { method, headers, body, cache: "no-store" });
  if (!answer.ok) {
    let message = `HTTP ${answer.status}`;
    try { message = (await answer.json()).error; } catch { /* not from the server itself */ }
    throw new Refused(answer.status, message);
  }
  return answer;
}

const post = (path, body, headers) => send(path, "POST", body, headers);

async function ask(path, method = "GET", body = undefined) {
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  const answer = await send(path, method, body === undefined ? undefined : JSON.stringify(body), headers);
  const text = await answer.text();
  return answer.headers.get("Content-Type").startsWith("application/json") ? JSON.parse(text) : text;
}

// What a server may not have, such as a repository, or not show to this token, is null and not asked for again.
const missing = new Set();

async function maybe(path) {
  if (missing.has(path)) return null;
  try {
    return await ask(path);
  } catch (error) {
    if (!(error instanceof Refused) || ![403, 404, 501].includes(error.status)) throw error;
    missing.add(path);
    return null;
  }
}

function remember(versions, time) {
  for (const [key, one] of versions) {
    const kept = history.get(key) ?? [];
    kept.push({ time, requests: one.requests, failures: one.failures, buckets: one.buckets });
    history.set(key, kept.slice(-KEPT));
  }
  for (const key of history.keys()) if (!versions.has(key)) history.delete(key);
}

function rates(key) {
  const kept = history.get(key) ?? [];
  return kept.slice(1).map((now, index) => {
    const before = kept[index];
    const seconds = now.time - before.time;
    return {
      requests: Math.max(0, now.requests - before.requests) / seconds,
      p50: quantile(0.5, now.buckets, before.buckets),
      p99: quantile(0.99, now.buckets, before.buckets),
    };
  });
}

async function change(what, promise) {
  byId("message").textContent = "";
  try {
    await promise;
    await look();
  } catch (error) {
    if (error.status === 403) admin = false;
    byId("message").textContent = `${what} failed: ${error.message}`;
  }
}

function actions(model, version, labels, stored, traffic, hasStable) {
  if (!admin || !stored) return null;
  const path = `/v2/repository/models/${encodeURIComponent(model)}`;
  const cell = make("span");
  if (labels.includes("stable")) {
    cell.append(button("Roll back", `Roll back ${model} from version ${version}`, () => {
      if (confirm(`Move the label "stable" of ${model} back to where it stood before?`)) {
        change("the roll-back", ask(`${path}/labels/stable`, "POST", { rollback: true }));
      }
    }));
  } else {
    cell.append(button("Promote", `Promote version ${version} of ${model}`, () => {
      if (confirm(`Make version ${version} of ${model} stable?`)) {
        change("the promotion", ask(`${path}/labels/stable`, "POST", { version }));
      }
    }));
    if (traffic && hasStable && !isRunning(traffic.rollout) && !isMoving(traffic.adjustment) && !Object.keys(traffic.traffic.shares).length) {
      cell.append(button("Roll out", `Roll out version ${version} of ${model}`, () => {
        if (confirm(`Send more and more requests for ${model} to version ${version}, as long as it does well?`)) {
          change("the rollout", ask(`/v2/models/${encodeURIComponent(model)}/rollout`, "PUT", { version }));
        }
      }));
    }
  }
  return cell;
}

function drawTiles(metrics, versions, firing) {
  const latest = [...versions.keys()].map((key) => rates(key).at(-1)).filter(Boolean);
  const slowest = latest.map(({ p99 }) => p99).filter((value) => value !== null);
  const memory = metrics.get("process_resident_memory_bytes")?.[0]?.value ?? 0;
  const tiles = [
    ["Requests a second", number(latest.reduce((sum, { requests }) => sum + requests, 0), 0)],
    ["Slowest p99", slowest.length ? milliseconds(Math.max(...slowest)) : "-"],
    ["Versions", String(versions.size)],
    ["Memory", bytes(memory)],
    ["Connections", number(metrics.get("lepton_connections")?.[0]?.value ?? 0, 0)],
    ["Alerts firing", String(firing)],
  ];
  byId("tiles").replaceChildren(...tiles.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

function drawAlerts(alerts) {
  const shown = alerts.filter(({ state }) => state === "firing" || state === "pending");
  if (!shown.length) {
    byId("alerts").replaceChildren(make("p", { className: "good" }, alerts.length ? "No alert fires." : "There are no alert rules."));
    return;
  }
  const rows = shown.map((alert) => [
    make("span", { className: alert.state === "firing" ? "bad" : "quiet" }, alert.state),
    alert.rule, `${alert.model} ${alert.version}`, alert.when, number(alert.value, 4),
    new Date(1000 * alert.since).toLocaleString(),
  ]);
  byId("alerts").replaceChildren(table("Alerts that fire or will",
    [["State"], ["Alert"], ["Model"], ["Condition"], ["Value", "number"], ["Since"]], rows));
}

// What an admin may end: the rollout or the adjustment if one goes on, or else the shares that were set.
function endOf(model, traffic) {
  if (!admin) return null;
  const base = `/v2/models/${encodeURIComponent(model)}`;
  const end = (text, question, what, route) => button(text, `${text} of ${model}`, () => {
    if (confirm(question)) change(what, ask(route, "DELETE"));
  });
  if (isRunning(traffic.rollout)) {
    const question = `Have the stable version of ${model} answer all requests again?`;
    return end("Stop the rollout", question, "stopping the rollout", `${base}/rollout`);
  }
  if (isMoving(traffic.adjustment)) {
    const question = `Have the weights of ${model} stay where they are now?`;
    return end("Stop the adjustment", question, "stopping the adjustment", `${base}/adjustment`);
  }
  if (!Object.keys(traffic.traffic.shares).length && !traffic.traffic.shadow) return null;
  return end("Clear the shares", `Have one version of ${model} answer all requests?`, "clearing the shares", `${base}/traffic`);
}

// The models to draw, and how many others there are. What is written to filter them stays while the page is drawn again.
function namesOf(index, stored) {
  const names = [...new Set([...index, ...(stored ?? [])].map(({ name }) => name))];
  const found = chosen(names, byId("filter").value, MOST_SHOWN);
  byId("filter-line").hidden = found.few;
  return found;
}

function drawModels(versions, index, stored, shared) {
  const { shown, more } = namesOf(index, stored);
  const opened = new Set([...document.querySelectorAll("details[open]")].map((each) => each.dataset.key));
  const focused = document.activeElement?.getAttribute("aria-label");
  const known = new Map(); // model -> version -> {version, state, reason, labels}
  const at = (model, version) => {
    if (!known.has(model)) known.set(model, new Map());
    const entries = known.get(model);
    if (version && !entries.has(version)) entries.set(version, { version, state: "", reason: "", labels: [] });
    return entries.get(version) ?? {};
  };
  for (const { name, version, state, reason } of index) Object.assign(at(name, version), { state: state ?? "", reason: reason ?? "" });
  for (const { name, versions: kept } of stored ?? []) for (const { version, labels } of kept) at(name, version).labels = labels;
  const problems = new Map((stored ?? []).filter(({ problem }) => problem).map(({ name, problem }) => [name, problem]));
  const cards = shown.map((model) => {
    const found = known.get(model) ?? new Map();
    const entries = [...found.values()].sort((one, other) => Number(other.version) - Number(one.version));
    const rows = entries.map(({ version, state, reason, labels: mine }) => {
      const key = `${model}/${version}`;
      const one = versions.get(key);
      const latest = rates(key).at(-1);
      const judged = one ? one.right + one.wrong : 0;
      const drift = one?.drift.length ? Math.max(...one.drift.map(({ psi }) => psi)) : null;
      return [
        version, make("span", {}, ...mine.map((label) => make("span", { className: "label" }, label))),
        make("span", { className: state === "READY" ? "good" : "quiet", title: reason }, state || "not loaded"),
        latest ? number(latest.requests) : "-", latest ? milliseconds(latest.p50) : "-", latest ? milliseconds(latest.p99) : "-",
        one ? number(one.failures, 0) : "-", judged ? percent(one.right / judged) : "-",
        drift === null ? "-" : make("span", { className: drift > 0.2 ? "bad" : "" }, number(drift, 3)),
        actions(model, version, mine, stored !== null, shared.get(model), entries.some(({ labels }) => labels.includes("stable"))),
      ];
    });
    const problem = problems.has(model) ? make("p", { className: "bad" }, problems.get(model)) : null;
    const card = make("article", { className: "card" }, make("h3", {}, model), problem, table(`Versions of ${model}`, [
      ["Version"], ["Labels"], ["State"], ["Requests/s", "number"], ["p50", "number"], ["p99", "number"],
      ["Failed", "number"], ["Accuracy", "number"], ["Drift", "number"], ["Change"],
    ], rows));
    const traffic = shared.get(model);
    if (traffic) card.append(...drawTraffic(traffic, endOf(model, traffic), opened));
    for (const { version, state } of entries) {
      const key = `${model}/${version}`;
      const one = versions.get(key);
      if (!one || state !== "READY") continue;
      const seen = rates(key);
      const details = make("details", {}, make("summary", {}, `Version ${version}: load, latency and drift`), make("div", { className: "plots" },
        plot("Requests a second", seen.map(({ requests }) => requests), (value) => number(value, 0)),
        plot("p99", seen.map(({ p99 }) => p99), milliseconds)));
      details.dataset.key = key;
      details.open = opened.has(key);
      if (one.drift.length) {
        const sorted = [...one.drift].sort((a, b) => b.psi - a.psi);
        details.append(table(`Drift of ${model} version ${version}, most first`, [["Feature"], ["Stability index", "number"]],
          sorted.map(({ feature, psi }) => [feature, make("span", { className: psi > 0.2 ? "bad" : "" }, number(psi, 3))])));
      }
      card.append(details);
    }
    return card;
  });
  const none = byId("filter").value ? "No model has such a name." : "No model is loaded.";
  byId("models").replaceChildren(...(cards.length ? cards : [make("p", {}, none)]),
    ...(more ? [make("p", { className: "quiet" }, `and ${more} more`)] : []));
  if (focused) [...document.querySelectorAll("[aria-label]")].find((each) => each.getAttribute("aria-label") === focused)?.focus();
}

function drawAudit(audit) {
  byId("audit-section").hidden = audit === null;
  if (audit === null) return;
  const rows = audit.toReversed().map((entry) => [entry.time, entry.who, entry.action, entry.target, entry.outcome]);
  byId("audit").replaceChildren(rows.length
    ? table("Latest changes first", [["Time"], ["Who"], ["What"], ["Of"], ["Outcome"]], rows)
    : make("p", {}, "Nothing was changed yet."));
}

let offered = ""; // the form is made anew only for other models: something may be written in it

async function offerExplanations(index) {
  const names = explained(index);
  byId("explain-section").hidden = !names.length;
  if (names.join("\n") === offered) return;
  offered = names.join("\n");
  if (names.length) await drawExplain(byId("explain"), names, ask, post);
}

let drawAgain = () => {};

async function look() {
  const [text, index, alerts, stored, audit] = await Promise.all([
    ask("/metrics"), ask("/v2/repository/index", "POST", {}), ask("/v2/alerts"),
    maybe("/v2/repository/models"), maybe("/v2/audit?limit=50"),
  ]);
  const shown = new Set(namesOf(index, stored).shown);
  const several = (stored ?? []).filter(({ name, versions: kept }) => kept.length > 1 && shown.has(name))
    .map(({ name }) => name).slice(0, MOST_SHARED);
  const told = await Promise.all(several.map((name) => maybe(`/v2/models/${encodeURIComponent(name)}/traffic`)));
  const shared = new Map(several.map((name, at) => [name, told[at]]).filter(([, each]) => each));
  const metrics = parseMetrics(text);
  const versions = perVersion(metrics);
  remember(versions, performance.now() / 1000);
  const firing = alerts.alerts.filter(({ state }) => state === "firing").length;
  const ready = metrics.get("lepton_ready")?.[0]?.value === 1;
  byId("status").textContent = `${location.host}: ${ready ? "ready" : "not ready"}`;
  byId("status").className = ready ? "good" : "bad";
  document.title = firing ? `(${firing}) lepton_xla` : "lepton_xla";
  drawTiles(metrics, versions, firing);
  drawAlerts(alerts.alerts);
  drawAgain = () => drawModels(versions, index, stored, shared);
  drawAgain();
  drawAudit(audit);
  await offerExplanations(index);
}

function show(signedIn) {
  byId("page").hidden = !signedIn;
  byId("sign-in").hidden = signedIn;
  byId("sign-out").hidden = !sessionStorage.getItem(TOKEN);
}

async function run() {
  try {
    await look();
    show(true);
  } catch (error) {
    if (error.status === 401 || error.status === 403) {
      const tried = sessionStorage.getItem(TOKEN);
      sessionStorage.removeItem(TOKEN);
      byId("sign-in-error").textContent = tried ? error.message : "";
      byId("status").textContent = `${location.host}: sign in`;
      show(false);
      return; // until the form is sent
    }
    byId("status").textContent = `${location.host}: no answer`;
    byId("status").className = "bad";
  }
  setTimeout(run, document.hidden ? 5 * POLL_MS : POLL_MS);
}

byId("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, byId("token").value);
  byId("token").value = "";
  admin = true;
  missing.clear();
  run();
});
byId("filter").addEventListener("input", () => drawAgain());
byId("sign-out").addEventListener("click", () => {
  sessionStorage.removeItem(TOKEN);
  location.reload();
});
run();
