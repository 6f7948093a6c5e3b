"""Alert rules as Prometheus has them, for those whose alerts come from there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from lepton_xla.serve.monitor.rules import Condition, Rule, Rules

_BY = "sum by (model, version)"


def rule_groups(rules: Rules, group: str = "lepton_xla") -> dict[str, Any]:
    """A Prometheus rule file as plain data."""
    return {"groups": [{"name": group, "rules": [_entry(rule) for rule in rules.rules]}]}


def prometheus_rules(rules: Rules, group: str = "lepton_xla") -> str:
    """A Prometheus rule file (YAML).

    Quantities over a number of rows have no PromQL: the server exports their values as `lepton_rule_value`, if it is
    given the same rules.

    >>> rules = Rules.parse("[[rule]]\\nname = 'wrong'\\nwhen = 'accuracy < 0.95 for 5m'")
    >>> prometheus_rules(rules).splitlines()[3:]  # doctest: +ELLIPSIS
    ['      - alert: "wrong"', ..., '        for: "5m"', ...]
    """
    return "\n".join(_yaml(rule_groups(rules, group), "")) + "\n"


def _entry(rule: Rule) -> dict[str, Any]:
    about = "{{ $labels.model }} version {{ $labels.version }}: "
    summary = _literal(rule.summary) if rule.summary else about + _literal(rule.when)
    hold = {"for": _duration(rule.condition.hold_s)} if rule.condition.hold_s else {}
    return {
        "alert": rule.name,
        "expr": expression(rule),
        **hold,
        "labels": {"severity": _literal(rule.severity)},
        "annotations": {"summary": summary},
    }


def _literal(text: str) -> str:
    """A text that Prometheus' templates leave as it is."""
    return text.replace("{{", '{{ "{{" }}')


def _yaml(value: Mapping[str, Any], indent: str) -> Iterable[str]:
    """A mapping of texts, mappings and lists of mappings in YAML's block style; JSON's strings are YAML's."""
    for key, each in value.items():
        if isinstance(each, Mapping):
            yield f"{indent}{key}:"
            yield from _yaml(each, indent + "  ")
        elif isinstance(each, list):
            yield f"{indent}{key}:" if each else f"{indent}{key}: []"
            for item in each:
                first, *rest = _yaml(item, indent + "    ")
                yield f"{indent}  - {first.strip()}"
                yield from rest
        else:
            yield f"{indent}{key}: {_quoted(each)}"


def expression(rule: Rule) -> str:
    """A rule's condition in PromQL."""
    condition = rule.condition
    chosen = {key: value for key, value in (("model", rule.model), ("version", rule.version)) if value}
    return f"{_value(condition, rule.name, chosen)} {condition.operator} {condition.value:.12g}"


def _value(condition: Condition, name: str, chosen: dict[str, Any]) -> str:
    def rate(metric: str) -> str:
        return f"(rate({metric}{_labels(chosen)}[{_duration(condition.over)}]))"

    quantity = condition.quantity
    answered = f"{_BY} {rate('lepton_inference_requests_total')}"
    counters = {
        "errors": "lepton_inference_failures_total", "rejected": "lepton_inference_rejected_total",
        "expired": "lepton_inference_expired_total",
    }  # fmt: skip
    if quantity == "queue":
        return f"{_BY} (lepton_queue_rows{_labels(chosen)})"
    if quantity == "requests":
        return answered
    if quantity in counters:
        asked = " + ".join([answered, *(f"{_BY} {rate(each)}" for each in counters.values())])
        return f"{_BY} {rate(counters[quantity])} / ({asked})"
    if quantity.startswith("p") and quantity[1:2].isdigit():
        share = f"{float(quantity[1:]) / 100:.12g}"
        return f"histogram_quantile({share}, sum by (model, version, le) {rate('lepton_request_seconds_bucket')})"
    return f"lepton_rule_value{_labels({'rule': name, **chosen})}"


def _labels(values: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}={_quoted(value)}" for key, value in values.items()) + "}" if values else ""


def _quoted(text: str) -> str:
    # JSON's strings are YAML's and PromQL's, but for characters that it writes as two.
    return "".join(['"', *(f"\\U{ord(each):08x}" if each > "\uffff" else json.dumps(each)[1:-1] for each in text), '"'])


def _duration(seconds: float) -> str:
    if seconds % 1:
        return f"{max(1, round(1000 * seconds))}ms"
    return f"{round(seconds)}s" if seconds % 60 else f"{round(seconds / 60)}m"
