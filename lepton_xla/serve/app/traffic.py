"""The routes of traffic and rollouts: how requests are shared among the versions of a model, and how each does."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Callable, Mapping
from time import time

from lepton_xla.errors import RepositoryError
from lepton_xla.serve.app.pages import Gather
from lepton_xla.serve.app.repository import Control, RepositoryPages, asker_of
from lepton_xla.serve.app.uploads import find_model, told
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.exchange import Exchange
from lepton_xla.serve.models import plans
from lepton_xla.serve.models.found import Found
from lepton_xla.serve.models.registry import Registry
from lepton_xla.serve.models.repository import Repository
from lepton_xla.serve.monitor.alerts import mirrored_rows, quantile
from lepton_xla.serve.observe.server_metrics import ServerMetrics
from lepton_xla.serve.protocol.traffic import (
    ArmFigures,
    Plan,
    Rollout,
    RolloutRequest,
    Traffic,
    TrafficShown,
    parse_body,
)
from lepton_xla.serve.traffic.bandit import off_policy

type Change = Callable[[Plan, Found], Plan]


class TrafficPages:
    """Answers requests about traffic and rollouts.

    Args:
        models: the models served.
        control: has what the repository says carried out in all processes.
        folder: of the repository; empty if there is none that may be written to.
        pages: answers later.
        gather: calls back with the counters of the whole server.
        record: told of every change, as `Audit.record` is.
    """

    def __init__(
        self,
        models: Registry,
        control: Control,
        folder: str,
        pages: RepositoryPages,
        gather: Gather,
        record: Callable[..., object],
    ) -> None:
        self._models = models
        self._control = control
        self._repository = Repository(pathlib.Path(folder)) if folder else None
        self._pages = pages
        self._gather = gather
        self._record = record

    def __call__(self, route: str, model: str, who: str, exchange: Exchange) -> None:
        """Answers a request of one of these routes."""
        if self._repository is None:
            raise HTTPError(501, "this server's repository is no folder that it may write to")
        name, who = who, asker_of(who, exchange)
        match route:
            case "show_traffic":
                work = self._traffic(model)
            case "set_traffic":
                asked = parse_body(exchange.body, Traffic)
                loaded = self._models.versions(model) if model in self._models.names() else None
                work = self._set(model, who, asked, loaded)
            case "clear_traffic":
                work = self._set(model, who, Traffic(), None)
            case "show_rollout":
                work = self._rollout(model)
            case "start_rollout":
                wanted = parse_body(exchange.body, RolloutRequest)
                work = self._change_rollout(
                    model, who, "start", lambda plan, found: plans.with_rollout(plan, found, wanted, name, time())
                )
            case _:
                work = self._change_rollout(
                    model, who, "stop", lambda plan, found: plans.with_stop(plan, found, name, time())
                )
        self._pages.answer_later(exchange, work, f"the request for {route.partition('_')[2]} failed")

    # Traffic.

    async def _traffic(self, model: str) -> TrafficShown:
        plan = (await self._find(model)).plan
        shown: asyncio.Future[TrafficShown] = asyncio.get_running_loop().create_future()

        def show(metrics: ServerMetrics) -> None:
            if not shown.done():
                shown.set_result(
                    TrafficShown(
                        model=model,
                        traffic=plan.in_force,
                        rollout=plan.rollout,
                        adjustment=plan.adjustment,
                        versions=self._arms(model, metrics),
                    )
                )

        self._gather(show)
        return await shown

    def _arms(self, model: str, metrics: ServerMetrics) -> list[ArmFigures]:
        """The figures of the loaded versions of a model."""
        if model not in self._models.names():
            return []
        split, labels = self._models.split(model), self._models.labels(model)
        shares = {self._models.find(model).signature.version: 1.0} if split is None else split.shares
        found: list[ArmFigures] = []
        for version in self._models.versions(model):
            counted = metrics.of(model, version)
            counts = counted.counts()
            feedback, mirrored = counts.get("feedback", {}), mirrored_rows(counts)
            estimate = off_policy(feedback.get("weighted", (0.0,) * 5))
            times, bounds = counts["request_s"][:-1], counted.request_s.bounds
            found.append(
                ArmFigures(
                    version=version,
                    labels=[label for label, stands in labels.items() if stands == version],
                    share=shares.get(version, 0.0),
                    requests=sum(times),
                    failures=counts["failures"],
                    p50_s=quantile(times, bounds, 0.5),
                    p99_s=quantile(times, bounds, 0.99),
                    feedback_rows=feedback.get("right", 0) + feedback.get("wrong", 0),
                    accuracy=metrics.monitoring.accuracy(model, version),
                    mirrored_rows=mirrored,
                    agreement=counts["shadow"]["same"] / mirrored if mirrored else None,
                    estimate=estimate.value if estimate.rows else None,
                    estimate_error=estimate.error if estimate.rows else None,
                )
            )
        return found

    async def _set(self, model: str, who: str, traffic: Traffic, loaded: list[str] | None) -> TrafficShown:
        def change(plan: Plan, found: Found) -> Plan:
            after = plans.with_traffic(plan, found, traffic, time())
            for version in plans.versions_of(after.arms, found.settings.labels):
                if loaded is not None and version not in loaded:
                    raise RepositoryError(
                        "conflict",
                        f"version {version} of model {model!r} is not loaded: see why in the index, or have it loaded "
                        "by a label or the policy in model.toml",
                    )
            return after

        shares = " ".join(f"{arm}={share:g}" for arm, share in traffic.shares.items())
        shadow = "" if traffic.shadow is None else f"{traffic.shadow.to}={traffic.shadow.fraction:g}"
        details = {"shares": shares, "sticky": traffic.sticky, "shadow": shadow}
        await self._change(model, who, "traffic", change, {name: each for name, each in details.items() if each})
        return await self._traffic(model)

    # Rollouts.

    async def _rollout(self, model: str) -> Rollout:
        rollout = (await self._find(model)).plan.rollout
        if rollout is None:
            raise RepositoryError("missing", f"model {model[:128]!r} has had no rollout")
        return rollout

    async def _change_rollout(self, model: str, who: str, action: str, change: Change) -> Rollout:
        rollout = (await self._change(model, who, f"{action} rollout", change, of_rollout=True)).rollout
        assert rollout is not None
        return rollout

    # Both.

    async def _find(self, model: str) -> Found:
        assert self._repository is not None
        return await find_model(self._repository, model)

    async def _change(
        self,
        model: str,
        who: str,
        action: str,
        change: Change,
        details: Mapping[str, str] | None = None,
        *,
        of_rollout: bool = False,
    ) -> Plan:
        """Writes another plan, and has it carried out."""
        assert self._repository is not None
        try:
            plan = await asyncio.to_thread(self._repository.replan, model, change)
        except RepositoryError as error:
            shown = told(error, self._repository.root)
            self._record(who, action, model[:128], "refused", reason=str(shown))
            raise shown from error
        if plan.rollout is not None and of_rollout:
            details = {"version": plan.rollout.version, "stable": plan.rollout.stable}
        self._record(who, action, model, "done", **(details or {}))
        await self._control.reroute(model, who)
        return plan
