"""`leptonx alerts`: checks alert rules, and writes them as Prometheus has them."""

from __future__ import annotations

import click

from lepton_xla.cli import _common


@click.group()
def alerts() -> None:
    """Check alert rules, or write them for Prometheus.

    Rules are TOML. Each has a condition, QUANTITY OPERATOR VALUE, over a window and for a time:

    \b
      [[rule]]
      name = "slow"
      when = "p99 > 50ms over 1m for 2m"
      [[rule]]
      name = "drifted"
      when = "drift(image) > 0.2"            over the last 500 rows
      model = "digits"                       only this model; version = "3" only this version
      severity = "page"                      "warning" if not given
      [[rule]]
      name = "wrong"
      when = "accuracy < 0.95 over 1000"     over the last 1,000 rows with feedback
      [[webhook]]
      url = "https://example.org/alerts"     in the form of Alertmanager's webhooks
      token_file = "token"                   sent as a bearer token

    \b
      leptonx alerts quantities                  lists what a condition may be about
      leptonx alerts check alerts.toml
      leptonx serve digits.lepton --alerts alerts.toml
    """


@alerts.command()
@_common.json_option
def quantities(*, as_json: bool) -> None:
    """List what a condition may be about."""
    from lepton_xla.serve.monitor.rules import QUANTITIES

    rows = [
        {
            "quantity": name
            + (f"({' | '.join(each.arguments)})" if each.arguments else "")
            + {"required": "" if each.arguments else "(CLASS)", "optional": "[(TENSOR)]", "none": ""}[each.argument],
            "what it is": each.text,
            "units": [unit for unit in each.units if unit],
            "window": {"time": f"{each.default:g} s", "rows": f"{each.default:g} rows", "now": "now"}[each.window],
        }
        for name, each in QUANTITIES.items()
    ]
    if as_json:
        _common.print_json(rows)
    else:
        cells = [(row["quantity"], row["what it is"], " ".join(row["units"]), row["window"]) for row in rows]
        _common.show(_common.table("", ("quantity", "what it is", "units", "window"), cells))


@alerts.command()
@click.argument("path", type=click.Path())
@_common.json_option
def check(path: str, *, as_json: bool) -> None:
    """Check the rules in PATH, and show how they are read."""
    from lepton_xla.serve.monitor.rules import QUANTITIES, Rules

    rules = Rules.load(path)
    found = [
        {
            "name": rule.name,
            "when": rule.when,
            "model": rule.model or "all",
            "over": f"{rule.condition.over:g} {'s' if QUANTITIES[rule.condition.quantity].window == 'time' else 'rows'}"
            if rule.condition.over
            else "now",
            "for": f"{rule.condition.hold_s:g} s",
            "severity": rule.severity,
        }
        for rule in rules.rules
    ]
    if as_json:
        _common.print_json({"rules": found, "webhooks": len(rules.webhooks)})
        return
    if found:
        _common.show(_common.table("", tuple(found[0]), [tuple(each.values()) for each in found]))
    click.echo(f"{len(found)} rules and {len(rules.webhooks)} webhooks are well formed")


@alerts.command()
@click.argument("path", type=click.Path())
@_common.json_option
def prometheus(path: str, *, as_json: bool) -> None:
    """Print the rules in PATH as a Prometheus rule file (YAML).

    \b
      leptonx alerts prometheus alerts.toml > lepton_rules.yml
      promtool check rules lepton_rules.yml
    """
    from lepton_xla.serve.monitor.exports import prometheus_rules, rule_groups
    from lepton_xla.serve.monitor.rules import Rules

    rules = Rules.load(path)
    if as_json:
        _common.print_json(rule_groups(rules))
    else:
        click.echo(prometheus_rules(rules), nl=False)
