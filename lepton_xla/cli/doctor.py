"""`leptonx doctor`: examines the installation and the machine."""

from __future__ import annotations

import click

from lepton_xla.cli import _common


@click.command()
@_common.json_option
def doctor(as_json: bool) -> None:
    """Examine this installation and this machine, and say what to do about each fault.

    Versions, the pairing of Flax and JAX, devices, CPU features, kernels, the cache of measured times, and settings
    under which XLA is slow. Notes are about what works, but could be better.

    Exit code 0 if there is no fault, notes or not; 1 if there is one.

    \b
      leptonx doctor
      leptonx doctor --json | jq '.findings[] | select(.state == "fault")'
    """
    with _common.progress() as step:
        step("examine the installation")
        import dataclasses

        from lepton_xla.environment.diagnosis import diagnose

        findings = diagnose()
    faults = [finding for finding in findings if finding.state == "fault"]
    if as_json:
        _common.print_json({"ok": not faults, "findings": [dataclasses.asdict(each) for each in findings]})
    else:
        rows = [("" if each.state == "ok" else each.state, each.name, each.found) for each in findings]
        advised = [finding for finding in findings if finding.state != "ok" and finding.advice]
        notes = [finding for finding in findings if finding.state == "note"]
        _common.show(
            _common.table("", ("", "what", "found"), rows),
            *(f"{finding.state}, {finding.name}: {finding.advice}" for finding in advised),
            f"{len(faults)} faults, {len(notes)} notes",
        )
    if faults:
        raise SystemExit(1)
