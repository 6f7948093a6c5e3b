"""`leptonx traffic`: shares requests among the versions of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lepton_xla.cli import _common, _repositories, _traffic

if TYPE_CHECKING:
    from lepton_xla.serve.client.repository import RepositoryClient
    from lepton_xla.serve.models.repository import Repository


@click.group()
def traffic() -> None:
    """Share the requests that name no version among the versions of a model, and show how each does.

    MODELS is the folder of a repository, or the URL of a server of one, whose tokens must have the scope admin.

    \b
      leptonx traffic show http://127.0.0.1:8000 digits
      leptonx traffic set MODELS digits stable=0.95 canary=0.05          shares add up to 1
      leptonx traffic set MODELS digits 3=0.5 4=0.5 --sticky x-user      equal headers, equal versions
      leptonx traffic set MODELS digits --shadow canary=0.2              a fifth is asked of canary too, afterwards
      leptonx traffic set MODELS digits 3=0.5 4=0.5 --bandit             shares follow the feedback
      leptonx traffic clear MODELS digits
    """


@_repositories.subcommand(traffic, "show")
@click.argument("name")
def show(repository: Repository | RepositoryClient, name: str, *, as_json: bool) -> None:
    """Show how requests for the model NAME are shared, and, from a server, what is known of its versions."""
    _show(_traffic.shown(repository, name), as_json)


@_repositories.subcommand(traffic, "set")
@click.argument("name")
@click.argument("shares", nargs=-1, metavar="[VERSION=SHARE]...")
@click.option("--sticky", default="", help="Header by which clients stay at one version, or `id`.")
@click.option("--shadow", metavar="VERSION[=FRACTION]", help="A version that is asked too, after the answer was sent.")
@click.option("--bandit", is_flag=True, help="Have the shares follow the feedback, by Thompson sampling.")
@click.option("--promote", is_flag=True, help="And `stable` moved to the version that is surely the best.")
def set_shares(
    repository: Repository | RepositoryClient,
    name: str,
    shares: tuple[str, ...],
    *,
    sticky: str,
    shadow: str | None,
    bandit: bool,
    promote: bool,
    as_json: bool,
) -> None:
    """Share the requests for the model NAME among versions or labels, such as stable=0.95 canary=0.05."""
    _common.check_goes_with("bandit", "promote")
    wanted: dict[str, Any] = {"shares": _parsed(shares)}
    if sticky:
        wanted["sticky"] = sticky
    if shadow is not None:
        to, given, fraction = shadow.partition("=")
        wanted["shadow"] = {"to": to, "fraction": _number(shadow, fraction) if given else 1.0}
    if bandit:
        wanted["bandit"] = {"promote": promote}
    if not shares and shadow is None:
        raise click.UsageError("give shares, such as stable=0.95 canary=0.05, or --shadow VERSION")
    _show(_traffic.changed(repository, name, wanted), as_json)


@_repositories.subcommand(traffic, "clear")
@click.argument("name")
def clear(repository: Repository | RepositoryClient, name: str, *, as_json: bool) -> None:
    """Send all requests for the model NAME to one version again: the stable one, or else the greatest."""
    _show(_traffic.changed(repository, name, {}), as_json)


def _parsed(shares: tuple[str, ...]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in shares:
        arm, given, number = text.partition("=")
        if not given:
            raise click.UsageError(f"{text!r}: expected VERSION=SHARE, such as canary=0.05")
        if arm in found:
            raise click.UsageError(f"{arm!r} has two shares")
        found[arm] = _number(text, number)
    return found


def _number(text: str, number: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise click.UsageError(f"{text!r}: {number!r} is no number from 0 to 1") from None


def _show(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _common.print_json(document)
        return
    now = document["traffic"]
    lines = [f"{document['model']}: {arm} gets {share:.4g} of the requests" for arm, share in now["shares"].items()]
    if not lines:
        lines = [f"{document['model']}: one version answers all requests that name none"]
    if now["sticky"]:
        lines.append(f"sticky by {'the id' if now['sticky'] == 'id' else 'header ' + now['sticky']}")
    if now["shadow"] is not None:
        lines.append(f"{now['shadow']['to']} is asked {now['shadow']['fraction']:.4g} of the requests too")
    if document["rollout"] is not None and document["rollout"]["state"] in ("shadow", "canary"):
        lines.append("a rollout says so: leptonx rollout show")
    rows = [
        (
            each["version"],
            " ".join(each["labels"]),
            f"{each['share']:.4g}",
            each["requests"],
            each["failures"],
            _seconds(each["p50_s"]),
            _seconds(each["p99_s"]),
            each["feedback_rows"],
            _share(each["accuracy"]),
            each["mirrored_rows"],
            _share(each["agreement"]),
            "" if each["estimate"] is None else f"{_share(each['estimate'])} ± {100 * each['estimate_error']:.1f}",
        )
        for each in document["versions"]
    ]
    columns = (
        ">version", "labels", ">share", ">requests", ">failed", ">p50", ">p99", ">feedback", ">accuracy", ">mirrored",
        ">agreement", ">estimate",
    )  # fmt: skip
    _common.show(*lines, *((_common.table("", columns, rows),) if rows else ()))


def _seconds(value: float | None) -> str:
    return "" if value is None else _common.seconds(value)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
