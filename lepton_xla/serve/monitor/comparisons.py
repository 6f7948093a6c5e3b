"""Rules about two versions: the conditions of alerts, with the value of the stable version on their right side.

    accuracy < stable - 2% over 500       p99 > stable * 1.5 for 1m       accuracy < stable surely

`surely` asks whether it is so by all evidence, and not in a window: the bounds of both rates must say it, which hold
however often one looks.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from lepton_xla.errors import ServeError
from lepton_xla.serve.monitor.alerts import Subject, judged_rows, measure, mirrored_rows
from lepton_xla.serve.monitor.certainty import rate_bounds
from lepton_xla.serve.monitor.rules import QUANTITIES, Condition, parse_condition

_RELATIVE = re.compile(
    r"(?P<head>.*?(?:<=|>=|<|>))\s*stable\b\s*"
    r"(?:(?P<sign>[-+*])\s*(?P<value>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z%/]*))?(?P<tail>(?:\s+(?:over|for)\s.*)?)"
)
_SURELY = re.compile(r"(.*\S)\s+surely")
_RATES = ("accuracy", "agreement", "errors")


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """A parsed rule.

    Attributes:
        text: as it was written.
        condition: what is looked at; its value is a number of the right side.
        sign: how that number is applied to the stable version's; empty where the value stands alone.
        surely: whether all evidence must say it.
    """

    text: str
    condition: Condition
    sign: Literal["", "+", "-", "*"]
    surely: bool

    def limit(self, stable: float) -> float:
        """The right side, given the value of the stable version."""
        match self.sign:
            case "":
                return self.condition.value
            case "+":
                return stable + self.condition.value
            case "-":
                return stable - self.condition.value
            case "*":
                return stable * self.condition.value


class Verdict(NamedTuple):
    """What a rule says.

    Attributes:
        holds: whether it is true; None with too few data.
        figures: what it was judged by: name -> value.
    """

    holds: bool | None
    figures: dict[str, float]


def parse_comparison(text: str) -> Comparison:
    """Parse a rule about a version, and the stable one if the word `stable` is on its right side.

    Raises:
        ServeError: if it does not parse; the message says what would.

    >>> parse_comparison("accuracy < stable - 2% over 500").condition.value
    0.02
    >>> parse_comparison("p99 > stable surely")
    Traceback (most recent call last):
    lepton_xla.errors.ServeError: 'p99 > stable surely': only accuracy, agreement and errors can be so surely; leave ...
    """
    sure = _SURELY.fullmatch(text.strip())
    plain = text.strip() if sure is None else sure[1]
    found = _RELATIVE.fullmatch(plain)
    sign: Any = ""
    if found is not None:
        name = re.match(r"[a-z][a-z0-9.]*", plain)
        quantity = QUANTITIES.get(name[0] if name else "")
        unit = "" if quantity is None else quantity.units[0]
        sign = found["sign"] or "+"
        if sign == "*" and found["unit"]:
            raise ServeError(f"{text!r}: a factor has no unit")
        number = f"{found['value'] or 0}{found['unit'] if sign != '*' and found['value'] else unit}"
        plain = f"{found['head']} {number}{found['tail']}"
    try:
        condition = parse_condition(plain)
    except ServeError as error:
        raise ServeError(str(error).replace(repr(plain), repr(text))) from None
    if condition.quantity in ("falls", "certificate"):
        raise ServeError(
            f"{text!r}: {condition.quantity} is for alerts; compare accuracy itself, such as accuracy < stable surely"
        )
    if found is not None and condition.quantity == "agreement":
        raise ServeError(f"{text!r}: agreement is with the stable version: compare it with a number")
    if found is not None and sign == "*":
        condition = dataclasses.replace(condition, value=float(found["value"]))
    if sure is not None and condition.quantity not in _RATES:
        raise ServeError(
            f"{text!r}: only accuracy, agreement and errors can be so surely; leave the word out, or say how long by "
            "'for 2m'"
        )
    if sure is not None and condition.hold_s:
        raise ServeError(f"{text!r}: what is so surely need not be so for a time")
    return Comparison(text, condition, sign, sure is not None)


def judge(comparison: Comparison, version: Subject, stable: Subject) -> Verdict:
    """What a rule says of a version.

    Args:
        comparison: the rule.
        version: what is known of it.
        stable: what is known of the stable version.
    """
    name = comparison.condition.quantity
    if comparison.surely:
        return _surely(comparison, version, stable)
    value = measure(comparison.condition, version)
    base = measure(comparison.condition, stable) if comparison.sign else 0.0
    if value is None or base is None or not (_enough(comparison, version) and _enough(comparison, stable)):
        return Verdict(None, {})
    figures = {name: value} | ({f"stable {name}": base} if comparison.sign else {})
    limit = comparison.limit(base)
    return Verdict(dataclasses.replace(comparison.condition, value=limit).holds(value), figures)


def _enough(comparison: Comparison, subject: Subject) -> bool:
    """Whether a quantile is one of enough answers to be more than the slowest of a few."""
    name = comparison.condition.quantity
    if not (name.startswith("p") and name[1].isdigit()):
        return True
    window = subject.history.over(comparison.condition.over)
    answered = 0 if window is None else sum(window[0].get("request_s", [0, 0])[:-1])
    return answered * (1 - float(name[1:]) / 100) >= 1 - 1e-9


def _surely(comparison: Comparison, version: Subject, stable: Subject) -> Verdict:
    name = comparison.condition.quantity
    hits, trials = _counted(name, version.history.now)
    base_hits, base_trials = _counted(name, stable.history.now) if comparison.sign else (0.0, 0.0)
    if not trials or (comparison.sign and not base_trials):
        return Verdict(None, {})
    figures = {name: hits / trials, f"{name} of": trials}
    lower, upper = rate_bounds(hits, trials)
    base_lower, base_upper = 0.0, 0.0
    if comparison.sign:
        figures |= {f"stable {name}": base_hits / base_trials, f"stable {name} of": base_trials}
        base_lower, base_upper = rate_bounds(base_hits, base_trials)
    below = comparison.condition.operator in ("<", "<=")
    holds = upper < comparison.limit(base_lower) if below else lower > comparison.limit(base_upper)
    return Verdict(holds, figures)


def _counted(name: str, counts: Mapping[str, Any]) -> tuple[float, float]:
    """How often something happened, of how many."""
    if name == "accuracy":
        return float(counts.get("feedback", {}).get("right", 0)), float(judged_rows(counts))
    if name == "agreement":
        return float(counts.get("shadow", {}).get("same", 0)), float(mirrored_rows(counts))
    answered = sum(counts.get("request_s", [0, 0])[:-1])
    failed = counts.get("failures", 0)
    asked = answered + failed + counts.get("rejected", 0) + counts.get("expired", 0)
    return float(failed), float(asked)
