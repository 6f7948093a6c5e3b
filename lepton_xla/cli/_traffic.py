"""Traffic and rollouts of a repository in a folder, or of a running server, for the commands."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lepton_xla.errors import RepositoryError, first_line

if TYPE_CHECKING:
    from lepton_xla.serve.client.repository import RepositoryClient
    from lepton_xla.serve.models.found import Found
    from lepton_xla.serve.models.repository import Repository
    from lepton_xla.serve.protocol.traffic import Plan

_ASKER = "leptonx"


def shown(repository: Repository | RepositoryClient, name: str) -> dict[str, Any]:
    """The traffic of a model; with figures of the versions from a server only."""
    from lepton_xla.serve.models.repository import Repository

    return _of(name, _plan(repository, name)) if isinstance(repository, Repository) else repository.traffic(name)


def changed(repository: Repository | RepositoryClient, name: str, traffic: dict[str, Any]) -> dict[str, Any]:
    """The traffic of a model after it was set; cleared by an empty one."""
    from lepton_xla.serve.models import plans
    from lepton_xla.serve.models.repository import Repository
    from lepton_xla.serve.protocol.traffic import Traffic

    wanted = _converted(traffic, Traffic)
    if not isinstance(repository, Repository):
        return repository.set_traffic(name, traffic) if traffic else repository.clear_traffic(name)
    return _of(name, repository.replan(name, lambda plan, found: plans.with_traffic(plan, found, wanted, time.time())))


def _plan(repository: Repository, name: str) -> Plan:
    found = repository.find(name)
    if found.problem:
        raise RepositoryError("invalid", found.problem)
    return found.plan


def rollout_of(repository: Repository | RepositoryClient, name: str) -> dict[str, Any]:
    """The last rollout of a model."""
    from lepton_xla.serve.models.repository import Repository

    return _rolled(_plan(repository, name)) if isinstance(repository, Repository) else repository.rollout(name)


def started(repository: Repository | RepositoryClient, name: str, rollout: dict[str, Any]) -> dict[str, Any]:
    """A rollout that begins."""
    from lepton_xla.serve.models import plans
    from lepton_xla.serve.models.repository import Repository
    from lepton_xla.serve.protocol.traffic import RolloutRequest

    asked = _converted(rollout, RolloutRequest)
    if not isinstance(repository, Repository):
        return repository.start_rollout(name, rollout)
    change: Callable[[Plan, Found], Plan] = lambda plan, found: plans.with_rollout(  # noqa: E731
        plan, found, asked, _ASKER, time.time()
    )
    return _rolled(repository.replan(name, change))


def stopped(repository: Repository | RepositoryClient, name: str) -> dict[str, Any]:
    """A rollout that was stopped."""
    from lepton_xla.serve.models import plans
    from lepton_xla.serve.models.repository import Repository

    if not isinstance(repository, Repository):
        return repository.stop_rollout(name)
    return _rolled(repository.replan(name, lambda plan, found: plans.with_stop(plan, found, _ASKER, time.time())))


def _converted[T](value: dict[str, Any], kind: type[T]) -> T:
    import msgspec

    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, ValueError) as error:
        raise RepositoryError("invalid", first_line(error)) from error


def _of(name: str, plan: Plan) -> dict[str, Any]:
    import msgspec

    traffic, rollout = msgspec.to_builtins(plan.in_force), msgspec.to_builtins(plan.rollout)
    return {"model": name, "traffic": traffic, "rollout": rollout, "versions": []}


def _rolled(plan: Plan) -> dict[str, Any]:
    import msgspec

    if plan.rollout is None:
        raise RepositoryError("missing", "the model has had no rollout")
    return msgspec.to_builtins(plan.rollout)
