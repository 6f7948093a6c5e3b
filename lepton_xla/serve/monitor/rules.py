"""Alert rules: conditions such as `p99 > 50ms for 2m`, read from TOML."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from lepton_xla import toml
from lepton_xla.errors import ServeError

type Operator = Literal["<", "<=", ">", ">="]

_UNITS = {
    "": 1.0, "%": 0.01, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "/s": 1.0,
    "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30,
}  # fmt: skip
_SECONDS = ("us", "ms", "s", "m", "h")
_LONGEST_S = 3600.0
_MOST_RULES = 1000
_MOST_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Quantity:
    """What a condition may be about.

    Attributes:
        text: one line for people.
        units: what a value may be given in.
        argument: what stands in parentheses: `required`, `optional` or `none`.
        window: what it is looked at over: `time`, `rows`, or `now` for none.
        default: of the window: seconds, or rows.
        arguments: what may stand in parentheses; empty for any text.
    """

    text: str
    units: tuple[str, ...]
    argument: Literal["required", "optional", "none"]
    window: Literal["time", "rows", "now"]
    default: float = 0.0
    arguments: tuple[str, ...] = ()


QUANTITIES: dict[str, Quantity] = {
    **{
        f"p{share}": Quantity(f"{share} % of the answers take at most this long", _SECONDS, "none", "time", 60)
        for share in ("50", "90", "95", "99", "99.9")
    },
    "requests": Quantity("inferences answered a second", ("", "/s"), "none", "time", 60),
    "errors": Quantity("share of the inferences that failed", ("", "%"), "none", "time", 60),
    "rejected": Quantity("share of the inferences that were refused for load", ("", "%"), "none", "time", 60),
    "expired": Quantity("share of the inferences whose deadline passed", ("", "%"), "none", "time", 60),
    "queue": Quantity("rows that wait", ("",), "none", "now"),
    "drift": Quantity("population stability index of a tensor or feature, the largest of all", ("",), "optional",
                      "rows", 500),
    "shift": Quantity("how far that index is beyond what chance makes of so many rows, the largest of all", ("",),
                      "optional", "rows", 500),
    "ks": Quantity("Kolmogorov-Smirnov distance of a tensor or feature, the largest of all", ("", "%"), "optional",
                   "rows", 500),
    "missing": Quantity("share of values that are not finite, the largest of all", ("", "%"), "optional", "rows", 500),
    "accuracy": Quantity("share of the rows with feedback that were answered right", ("", "%"), "none", "rows", 1000),
    "agreement": Quantity("share of the rows that it was asked as a shadow and answered as the other version did",
                          ("", "%"), "none", "rows", 1000),
    "recall": Quantity("share of the rows of a class that were answered so", ("", "%"), "required", "rows", 1000),
    "precision": Quantity("share of the rows that were answered so that are of the class", ("", "%"), "required",
                          "rows", 1000),
    "falls": Quantity("how often ADWIN (extra `drift`) has found that the mean has fallen", ("",), "required", "time",
                      600, ("accuracy", "confidence")),
    "certificate": Quantity("evidence in feedback that the accuracy which the artifact's certificate promises does not "
                            "hold; by chance it comes to v in v looks", ("",), "none", "now"),
}  # fmt: skip

_CONDITION = re.compile(
    r"(?P<quantity>[a-z][a-z0-9.]*)\s*(\((?P<argument>[^()]*)\))?\s*(?P<operator><=|>=|<|>)\s*"
    r"(?P<value>\d+(\.\d+)?)\s*(?P<unit>[A-Za-z%/]*)"
    r"(\s+over\s+(?P<over>\d+)(?P<over_unit>[a-z]*))?(\s+for\s+(?P<hold>\d+)(?P<hold_unit>[a-z]+))?"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Condition:
    """A parsed condition.

    Attributes:
        quantity: a key of `QUANTITIES`.
        argument: what it is of: a tensor, a feature or a class; empty for all.
        operator: how it compares with the value.
        value: in seconds, bytes, rows or as a share.
        over: seconds or rows that it is looked at over.
        hold_s: seconds that it must be true for.

    >>> parse_condition("p99 > 50ms over 5m for 2m")
    Condition(quantity='p99', argument='', operator='>', value=0.05, over=300.0, hold_s=120.0)
    """

    quantity: str
    argument: str
    operator: Operator
    value: float
    over: float
    hold_s: float

    def holds(self, value: float) -> bool:
        """Whether it is true for a value."""
        match self.operator:
            case "<":
                return value < self.value
            case "<=":
                return value <= self.value
            case ">":
                return value > self.value
            case ">=":
                return value >= self.value


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """When to alert.

    Attributes:
        name: of the alert, unique among the rules.
        when: the condition as written.
        condition: the condition.
        model: the only model that it is about; empty for all.
        version: the only version; empty for all.
        severity: for whoever receives the alert.
        summary: one line for whoever receives the alert.
    """

    name: str
    when: str
    condition: Condition
    model: str = ""
    version: str = ""
    severity: str = "warning"
    summary: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Webhook:
    """Where alerts are sent.

    Attributes:
        url: gets a POST in the form of Alertmanager's webhooks.
        token_file: file of a bearer token to send.
    """

    url: str
    token_file: Path | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
    """Alert rules, and where alerts are sent.

    >>> Rules.parse('''
    ... [[rule]]
    ... name = "slow"
    ... when = "p99 > 50ms for 2m"
    ... ''').rules[0].condition.value
    0.05
    """

    rules: tuple[Rule, ...] = ()
    webhooks: tuple[Webhook, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> Rules:
        """Reads a TOML file.

        Raises:
            ServeError: if it cannot be read or a rule does not parse; the message names the rule.
        """
        try:
            with Path(path).open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
            if len(data) > _MOST_BYTES:
                raise ServeError(f"alert rules {str(path)!r} are larger than {_MOST_BYTES >> 10} KiB")
            text = data.decode()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not UTF-8 text"
            raise ServeError(f"alert rules {str(path)!r} cannot be read: {reason}") from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, name: str = "alert rules") -> Rules:
        """Reads TOML.

        Raises:
            ServeError: as `load`.
        """
        try:
            table = toml.parsed(text)
        except ValueError as error:
            raise ServeError(f"{name}: {error}") from None
        unknown = sorted(set(table) - {"rule", "webhook"})
        if unknown:
            raise ServeError(f"{name}: unknown key {unknown[0]!r}; the keys are [[rule]] and [[webhook]]")
        rules = tuple(
            _rule(entry, f"{name}: rule {index + 1}") for index, entry in enumerate(_tables(table, "rule", name))
        )
        if len(rules) > _MOST_RULES:
            raise ServeError(f"{name}: {len(rules)} rules; at most {_MOST_RULES} are looked at")
        names = [rule.name for rule in rules]
        twice = sorted({each for each in names if names.count(each) > 1})
        if twice:
            raise ServeError(f"{name}: two rules have the name {twice[0]!r}")
        hooks = tuple(
            _webhook(entry, f"{name}: webhook {index + 1}")
            for index, entry in enumerate(_tables(table, "webhook", name))
        )
        return cls(rules, hooks)


def parse_condition(text: str) -> Condition:
    """Parses a condition: `QUANTITY[(ARGUMENT)] OPERATOR VALUE[UNIT] [over WINDOW] [for DURATION]`.

    Raises:
        ServeError: if it does not parse; the message says what would.

    >>> parse_condition("accuracy < 95% over 2000").over
    2000.0
    >>> parse_condition("p98 > 1s")
    Traceback (most recent call last):
    lepton_xla.errors.ServeError: 'p98 > 1s': unknown quantity 'p98'; known: p50, p90, p95, p99, p99.9, requests, ...
    """
    found = _CONDITION.fullmatch(text.strip())
    if found is None:
        raise ServeError(
            f"{text!r} is no condition; write QUANTITY OPERATOR VALUE, as in 'p99 > 50ms for 2m', "
            "'drift(image) > 0.2' or 'accuracy < 0.95 over 1000'"
        )
    name = found["quantity"]
    quantity = QUANTITIES.get(name)
    if quantity is None:
        raise ServeError(f"{text!r}: unknown quantity {name!r}; known: {', '.join(QUANTITIES)}")
    argument = (found["argument"] or "").strip()
    if quantity.argument == "none" and found["argument"] is not None:
        raise ServeError(f"{text!r}: {name} takes nothing in parentheses")
    if quantity.arguments and argument not in quantity.arguments:
        raise ServeError(f"{text!r}: write {' or '.join(f'{name}({each})' for each in quantity.arguments)}")
    if quantity.argument == "required" and not argument:
        raise ServeError(f"{text!r}: {name} needs a class, as in {name}(3)")
    if found["unit"] not in quantity.units:
        units = ", ".join(unit or "none" for unit in quantity.units)
        what = f"has no unit {found['unit']!r}" if found["unit"] else "needs a unit"
        raise ServeError(f"{text!r}: {name} {what}; its units: {units}")
    operator: Any = found["operator"]
    return Condition(
        quantity=name,
        argument=argument,
        operator=operator,
        value=float(found["value"]) * _UNITS[found["unit"]],
        over=_window(text, name, quantity, found["over"], found["over_unit"]),
        hold_s=_duration(text, found["hold"], found["hold_unit"]) if found["hold"] else 0.0,
    )


def _window(text: str, name: str, quantity: Quantity, number: str | None, unit: str | None) -> float:
    if number is None:
        return quantity.default
    if quantity.window == "now":
        raise ServeError(f"{text!r}: {name} is looked at as it is now, not over a window")
    if quantity.window == "time":
        return _duration(text, number, unit)
    if unit:
        raise ServeError(f"{text!r}: {name} is looked at over a number of rows, not a time")
    if not 1 <= float(number) <= 1_000_000:
        raise ServeError(f"{text!r}: the number of rows must be 1 to 1000000")
    return float(number)


def _duration(text: str, number: str, unit: str | None) -> float:
    if unit not in _SECONDS:
        raise ServeError(f"{text!r}: a duration needs a unit: {', '.join(_SECONDS)}")
    seconds = float(number) * _UNITS[unit]
    if not 0 < seconds <= _LONGEST_S:
        raise ServeError(f"{text!r}: a duration must be more than 0 and at most an hour")
    return seconds


def _tables(table: Mapping[str, Any], key: str, name: str) -> list[dict[str, Any]]:
    entries = table.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ServeError(f"{name}: write each {key} as [[{key}]]")
    return entries


def _texts(entry: Mapping[str, Any], known: tuple[str, ...], required: tuple[str, ...], where: str) -> dict[str, str]:
    for key, value in entry.items():
        if key not in known:
            raise ServeError(f"{where}: unknown key {key!r}; the keys are {', '.join(known)}")
        if not isinstance(value, str):
            raise ServeError(f"{where}: {key} = {value!r} is not text")
    for key in required:
        if not entry.get(key):
            raise ServeError(f"{where} has no {key}")
    return dict(entry)


def _rule(entry: Mapping[str, Any], where: str) -> Rule:
    texts = _texts(
        entry, ("name", "when", "model", "version", "severity", "summary"), ("name", "when"), where
    )  # fmt: skip
    try:
        condition = parse_condition(texts["when"])
    except ServeError as error:
        raise ServeError(f"{where} ({texts['name']}): {error}") from None
    return Rule(condition=condition, **texts)


def _webhook(entry: Mapping[str, Any], where: str) -> Webhook:
    texts = _texts(entry, ("url", "token_file"), ("url",), where)
    try:
        parts = urlsplit(texts["url"])
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None
        _ = parts.port
    except ValueError:
        good = False
    if not good:
        # Not shown: a URL may hold a secret.
        raise ServeError(f"{where}: the URL must be http:// or https:// with a host and without a user name")
    token = texts.get("token_file")
    return Webhook(texts["url"], None if token is None else Path(token))
