"""The routes of adjustments: weights that move in steps towards others, while the model serves."""

from __future__ import annotations

import asyncio
import pathlib
import shutil
from collections.abc import Callable
from time import time

from lepton_xla.errors import LeptonError, RepositoryError
from lepton_xla.serve.app.repository import RepositoryPages, asker_of
from lepton_xla.serve.app.uploads import find_model, without_path
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.exchange import Exchange
from lepton_xla.serve.models import movements
from lepton_xla.serve.models.found import Found
from lepton_xla.serve.models.repository import Repository
from lepton_xla.serve.models.uploads import Uploads
from lepton_xla.serve.protocol.adjustment import Adjustment, AdjustmentRequest
from lepton_xla.serve.protocol.traffic import Plan, parse_body
from lepton_xla.serve.traffic.adjuster import check_target


class AdjustmentPages:
    """Answers requests about adjustments.

    Args:
        folder: of the repository; empty if there is none that may be written to.
        pages: answers later.
        record: told of every change, as `Audit.record` is.
        trusts: whether only signed artifacts are loaded, which the server's own steps are not.
    """

    def __init__(
        self, folder: str, pages: RepositoryPages, record: Callable[..., object], *, trusts: bool = False
    ) -> None:
        self._root = pathlib.Path(folder)
        self._repository = Repository(self._root) if folder else None
        self._pages = pages
        self._record = record
        self._trusts = trusts

    def __call__(self, route: str, model: str, who: str, exchange: Exchange) -> None:
        """Answers a request of one of these routes."""
        if self._repository is None:
            raise HTTPError(501, "this server's repository is no folder that it may write to")
        who = asker_of(who, exchange)
        if route == "start_adjustment":
            asked = parse_body(exchange.body, AdjustmentRequest)
            if self._trusts:
                raise HTTPError(409, "this server loads signed artifacts only, and could not sign the steps in between")
            work = self._changed(model, who, "start adjustment", lambda: self._start(model, who, asked), long=True)
        elif route == "stop_adjustment":
            work = self._changed(model, who, "stop adjustment", lambda: self._stop(model, who))
        else:
            work = self._shown(model)
        self._pages.answer_later(exchange, work, "the request for the adjustment failed")

    async def _shown(self, model: str) -> Adjustment:
        assert self._repository is not None
        return _of((await find_model(self._repository, model)).plan, model)

    async def _changed(
        self, model: str, who: str, action: str, work: Callable[[], Adjustment], *, long: bool = False
    ) -> Adjustment:
        try:
            made = await (self._pages.run_long(work) if long else asyncio.to_thread(work))
        except LeptonError as error:
            said = without_path(str(error), self._root)
            self._record(who, action, model[:128], "refused", reason=said)
            raise RepositoryError(error.kind if isinstance(error, RepositoryError) else "invalid", said) from error
        plan = made.plan
        self._record(
            who, action, f"{model}/{made.version}", "done", alpha=plan.alpha, steps=plan.steps, every_s=plan.every_s
        )
        return made

    # On a thread.

    def _start(self, model: str, who: str, asked: AdjustmentRequest) -> Adjustment:
        assert self._repository is not None
        found = self._repository.find(model)
        if found.problem:
            raise RepositoryError("invalid", found.problem)
        movements.refuse(found)
        current = found.versions[movements.serving(found)]
        uploads = Uploads(self._repository)
        with self._repository.stage(model) as staged:
            uploads.assemble(asked.manifest, model, staged)
            check_target(staged, current, nearest=asked.nearest)

            def begin(plan: Plan, found: Found) -> Plan:
                after = movements.begun(plan, found, asked, who, time())
                folder = movements.folder_of(self._root, model)
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                staged.rename(folder / movements.TARGET)
                return after

            plan = self._repository.replan(model, begin)
        uploads.forget(asked.manifest)
        return _of(plan, model)

    def _stop(self, model: str, who: str) -> Adjustment:
        assert self._repository is not None
        return _of(
            self._repository.replan(model, lambda plan, found: movements.stopped(plan, found, who, time())), model
        )


def _of(plan: Plan, model: str) -> Adjustment:
    if plan.adjustment is None:
        raise RepositoryError("missing", f"model {model[:128]!r} has had no adjustment")
    return plan.adjustment
