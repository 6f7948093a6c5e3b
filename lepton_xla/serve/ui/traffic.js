// How the requests for a model are shared among its versions, and how far a rollout or an adjustment is.

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

export const isMoving = (adjustment) => adjustment !== null && adjustment.state === "running";

// One sentence about weights that move towards others, or have moved.
export function movedOf({ plan, state, step, base, version, accuracy_before: before, decisions }) {
  const score = decisions.findLast(({ accuracy }) => accuracy !== null)?.accuracy;
  const far = `step ${step} of ${plan.steps}, each ${percent(plan.alpha)} of the way that is left`;
  const judged = before === null || score === undefined ? "" : `; golden rows right: ${percent(score)}, ${percent(before)} before`;
  return `${state === "running" ? "Weights move" : "Weights have moved"} from version ${base} to ${version}: ${far}${judged}.`;
}

// Elements for the card of a model; none where one version answers all requests and nothing was rolled out or adjusted.
export function drawTraffic(shown, end, opened) {
  const said = saidOf(shown);
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
  if (shown.adjustment) found.push(...drawAdjustment(shown.model, shown.adjustment, said ? null : end, opened));
  return found;
}

function drawAdjustment(model, adjustment, end, opened) {
  const kind = { done: "good", "went back": "bad", stopped: "bad" }[adjustment.state] ?? "quiet";
  const rows = adjustment.decisions.toReversed().map((each) => [
    each.time, String(each.step), each.version, each.accuracy === null ? "-" : percent(each.accuracy), each.reason,
  ]);
  const details = make("details", {},
    make("summary", {}, "Adjustment of the weights: ", make("span", { className: kind }, adjustment.state)),
    make("p", {}, movedOf(adjustment)),
    table(`Steps of the weights of ${model}, the latest first`,
      [["Time"], ["Step", "number"], ["Version"], ["Accuracy", "number"], ["Why"]], rows));
  details.dataset.key = `adjustment of ${model}`;
  details.open = opened.has(details.dataset.key);
  return isMoving(adjustment) && end ? [details, make("p", {}, end)] : [details];
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
