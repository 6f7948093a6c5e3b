"""`leptonx plan`: shows what a recipe would do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lepton_xla.cli import _common

if TYPE_CHECKING:
    from lepton_xla.passes.core.costs import CostReport
    from lepton_xla.passes.core.plans import Plan


@click.command()
@click.argument("target")
@_common.recipe_option
@_common.set_option
@_common.exclude_option
@_common.buckets_option
@click.option(
    "--groups", is_flag=True, help="Also show the groups of units (channels, heads) that can only be removed together."
)
@click.option("--plot", metavar="FILE.svg", help="Draw the groups as a matrix of weights by groups; needs matplotlib.")
@_common.mesh_option
@_common.rules_option
@_common.json_option
def plan(
    target: str,
    *,
    recipe: str,
    settings: tuple[str, ...],
    exclude: tuple[str, ...],
    buckets: tuple[str, ...],
    groups: bool,
    plot: str | None,
    mesh: str | None,
    rules: str | None,
    as_json: bool,
) -> None:
    """Show what a recipe would do to each site of the model TARGET, without doing it.

    A site is a product with a weight, a product of two activations, or an embedding lookup. FLOPs are those of one call
    at the smallest bucket. With --mesh, also show which part of each weight a device would hold; the devices need not
    exist.

    \b
      leptonx plan digits.py:model --recipe int8
      leptonx plan digits.py:model --recipe shrink50 --set shrink.flops=0.7 --exclude '.*head'
      leptonx plan my_package.models:encoder --recipe mine.toml --buckets batch=8
      leptonx plan digits.py:model --recipe int8 --groups --plot groups.svg
      leptonx plan digits.py:model --mesh data=4,model=2 --rules rules.toml
      leptonx plan digits.py:model --recipe int8 --json | jq '.sites[] | select(.kept != "")'
    """
    given = _common.parse_buckets(buckets)
    if plot is not None:
        _common.figure()  # raises if matplotlib is not installed
    _common.check_folder(plot)
    with _common.progress() as step:
        step("load JAX")
        from lepton_xla.cli import _models
        from lepton_xla.optimization.pipeline import plan_for
        from lepton_xla.passes.core.costs import cost
        from lepton_xla.passes.core.inventory import weights_report
        from lepton_xla.passes.shrinking.groups import find_groups

        _models.check_rules_have_mesh(mesh, rules)
        chosen = _models.load_recipe(recipe, settings, exclude)
        step(f"load {target}")
        spec = _models.load_target(target)
        program = spec.program()
        step("fold, shrink and find sites")
        batches = _models.calibration(spec, program)[0] if chosen.shrink is not None else None
        planned_program, found = plan_for(
            program, chosen, calibration=batches, buckets={**spec.buckets, **given}, progress=step
        )
        smallest = {symbol: sizes[0] for symbol, sizes in {**spec.buckets, **given}.items() if sizes}
        at = {symbol: smallest[symbol] for symbol in program.symbols} if set(program.symbols) <= set(smallest) else None
        step("count operations")
        counted = cost(planned_program, at)
        units = find_groups(planned_program, sizes=at) if groups or plot is not None else None
        placement = _models.placement(planned_program, mesh, rules) if mesh is not None else None
    document = _document(target, found, counted, planned_program.weights_bytes)
    removed = [report.to_json() for report in planned_program.history if report.name == "shrink"]
    document |= {"shrink": removed[0]} if removed else {}
    document["weights"] = weights_report(planned_program, found).to_json()
    document |= {"groups": units.to_json()} if units is not None and groups else {}
    if units is not None and plot is not None:
        units.draw(plot)
    document |= {"placement": placement.to_json()} if placement is not None else {}
    if as_json:
        _common.print_json(document)
        return
    if placement is None or recipe != _common.NO_RECIPE or settings or groups:
        _print(document)
    if placement is not None:
        _common.show(placement.table())


def _document(target: str, found: Plan, counted: CostReport, weights_bytes: int) -> dict[str, Any]:
    flops = {site.site: site.flops for site in counted.sites}
    sites = [{**site, "flops": flops.get(site["site"], 0)} for site in found.to_json()]
    return {
        "target": target,
        "recipe": found.recipe.name,
        "cast": found.recipe.cast,
        "sizes": counted.sizes,
        "sites": sites,
        "totals": {
            "sites": len(sites),
            "changed": sum(site["decision"] != "float" for site in sites),
            "kept": sum(bool(site["kept"]) for site in sites),
            "weight_bytes": weights_bytes,
            "site_weight_bytes": sum(
                {p.site.path: s["weight_bytes"] for p, s in zip(found.sites, sites, strict=True)}.values()
            ),
            "flops": counted.flops,
            "other_flops": counted.other_flops,
        },
    }


def _print(document: dict[str, Any]) -> None:
    from lepton_xla.cli import _reports

    totals = document["totals"]
    # If several sites share a weight, only the first shows its bytes.
    first = {
        site["weight"]: site["site"] for site in reversed(document["sites"]) if site["weight"] is not None
    }.values()
    rows = [
        (
            site["site"],
            site["kind"].replace("conv_general_dilated", "conv").replace("dot_general", "dot"),
            "x".join(map(str, site["shape"])) if site["shape"] else "",
            _common.size(site["weight_bytes"]) if site["site"] in first else "",
            site["repeats"],
            _common.short(site["flops"]),
            "; ".join(part for part in (site["decision"], site["kept"]) if part),
        )
        for site in document["sites"]
    ]
    rest = ("elsewhere", "", "", _common.size(totals["weight_bytes"] - totals["site_weight_bytes"]), "")
    rows.append((*rest, _common.short(totals["other_flops"]), ""))
    total = ("total", "", "", _common.size(totals["weight_bytes"]), "", _common.short(totals["flops"]), "")
    at = ", ".join(f"{name}={size}" for name, size in document["sizes"].items())
    for title, columns, lines in _unit_tables(document):
        _common.show(_common.table(title, columns, lines))
    _common.show(_reports.weights_table([document["weights"]]))
    _common.show(*_reports.remarks([document["shrink"]] if "shrink" in document else []))
    _common.show(
        _common.table(
            f"{document['target']}, recipe {document['recipe']}",
            ("site", "kind", "shape", ">weights", ">runs", ">FLOPs", "decision"),
            rows,
            total=total,
        ),
        f"{totals['changed']} of {totals['sites']} sites change, {totals['kept']} are kept for a reason."
        + (f" FLOPs of one call at {at}." if at else "")
        + ("" if document["cast"] == "none" else f" Products left in float are made {document['cast']}."),
    )


def _unit_tables(document: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]]:
    """Tables (title, headings, rows) of removed units, and of groups that could be removed."""
    tables: list[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]] = []
    if "shrink" in document:
        report = document["shrink"]
        before, after = (_common.size(report["metrics"][f"weights_bytes_{when}"]) for when in ("before", "after"))
        rows: list[tuple[Any, ...]] = [(site["site"], site["action"], site["reason"]) for site in report["sites"]]
        tables.append((f"units removed: weights {before} -> {after}", ("group", "decision", "reason"), rows))
    if "groups" in document:
        headings = ("group", "kind", ">units", ">steps", ">one unit", "members", "kept because")
        rows = [
            (
                group["name"],
                group["kind"],
                group["units"],
                " x ".join(map(str, group["steps"])),
                _common.size(group["unit_bytes"]),
                ", ".join(group["members"]),
                group["protected"],
            )
            for group in document["groups"]
        ]
        tables.append(("units that go together", headings, rows))
    return tables
