// How the requests for a model are shared among its versions, and how far a rollout is.

import { make, milliseconds, number, percent, table } from "./drawing.js";

export const isRunning = (rollout) => rollout !== null && (rollout.state === "shadow" || rollout.state === "canary");

// One sentence about what was set.
export function saidOf({ traffic, rollout }) {
  const said = [];
  if (isRunning(rollout)) {
    const stages = rollout.plan.stages.length;
    said.push(`Version ${rollout.version} is rolled out in place of ${rollout.stable}: stage ${rollout.stage + 1} of ${stages}, ${rollout.state}`);
  } else if (Object.keys(traffic.shares).length) {
    said.push(traffic.bandit ? "Requests are shared by a bandit that learns from feedback" : "Requests are shared");
  }
  if (traffic.sticky) said.push(traffic.sticky === "id" ? "sticky by the id" : `sticky by the header ${traffic.sticky}`);
  if (traffic.shadow) said.push(`${traffic.shadow.to} is asked ${percent(traffic.shadow.fraction)} of the requests too`);
  return said.length ? `${said.join("; ")}.` : "";
}

// Elements for the card of a model; none where one version answers all requests and there was no rollout.
export function drawTraffic(shown, end, opened) {
  const said = saidOf(shown);
  if (!said && !shown.rollout) return [];
  const found = [];
  if (said) {
    const rows = shown.versions.map((each) => [
      each.version, percent(each.share), number(each.requests, 0), number(each.failures, 0), milliseconds(each.p50_s),
      milliseconds(each.p99_s), each.feedback_rows ? percent(each.accuracy) : "-", percent(each.agreement),
      each.estimate === null ? "-" : `${percent(each.estimate)} \u00b1 ${number(100 * each.estimate_error, 2)}`,
    ]);
    found.push(make("p", {}, said), table(`Traffic of ${shown.model}`, [
      ["Version"], ["Share", "number"], ["Requests", "number"], ["Failed", "number"], ["p50", "number"], ["p99", "number"],
      ["Accuracy", "number"], ["Agreement", "number"], ["Estimate", "number"],
    ], rows));
    if (end) found.push(make("p", {}, end));
  }
  if (shown.rollout) found.push(drawRollout(shown.model, shown.rollout, opened));
  return found;
}

function drawRollout(model, rollout, opened) {
  const kind = { promoted: "good", "rolled back": "bad" }[rollout.state] ?? "quiet";
  const figures = (each) => Object.entries(each.figures).map(([name, value]) => `${name} ${number(value, 4)}`).join(", ");
  const rows = rollout.decisions.toReversed().map((each) => [
    each.time, each.who, each.state, String(each.stage + 1), each.reason, figures(each),
  ]);
  const key = `rollout of ${model}`;
  const details = make("details", {},
    make("summary", {}, `Rollout of version ${rollout.version}: `, make("span", { className: kind }, rollout.state)),
    make("p", {}, rollout.reason),
    table(`Decisions about version ${rollout.version} of ${model}, the latest first`,
      [["Time"], ["Who"], ["State"], ["Stage", "number"], ["Why"], ["Figures"]], rows));
  details.dataset.key = key;
  details.open = opened.has(key);
  return details;
}
