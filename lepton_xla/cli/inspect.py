"""`leptonx inspect`: shows the contents of an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from lepton_xla.cli import _common

if TYPE_CHECKING:
    from lepton_xla.compiler import Fingerprint, Manifest


@click.command()
@click.argument("path")
@_common.json_option
def inspect(path: str, as_json: bool) -> None:
    """Show the contents of the artifact at PATH, and how it would be loaded on this machine.

    Reads only the manifest. Executes nothing and checks no digests; `leptonx verify` does that.

    \b
      leptonx inspect digits.lepton
      leptonx inspect digits.lepton --json | jq .manifest.buckets
    """
    with _common.progress() as step:
        step(f"read {path}")
        import msgspec

        from lepton_xla.compiler import Fingerprint
        from lepton_xla.compiler.devices import devices_here
        from lepton_xla.compiler.opening import claimed_signer, read_manifest
        from lepton_xla.compiler.storage import Store

        store = Store(path)
        manifest, signer = read_manifest(store), claimed_signer(store)
        targets = [entry.target for entry in manifest.executables.values()]
        here = Fingerprint.of(None, devices_here(manifest.mesh)).best(targets)
    route = _route(manifest, here)
    weights = _weights(manifest)
    size_bytes = manifest.size_bytes
    if as_json:
        facts = {"path": path, "size_bytes": size_bytes, "route": route, "weights": weights, "signed_by": signer}
        _common.print_json({**facts, **_totals(manifest), "manifest": msgspec.to_builtins(manifest)})
    else:
        _print(path, manifest, signer, route, weights, size_bytes)


def _route(manifest: Manifest, here: Fingerprint) -> dict[str, Any]:
    """How `load` would load the artifact on this machine, and why not from compiled code if it cannot."""
    from lepton_xla.compiler.buckets import bucket_name, combinations

    if manifest.is_update:
        return {"route": "shared", "fit": manifest.fit}
    found = manifest.executables.get(here.digest)
    wanted = [bucket_name(sizes) for sizes in combinations(manifest.buckets)]
    missing = [bucket for bucket in wanted if found is not None and bucket not in found.files]
    differences = {digest: here.differences(entry.target) for digest, entry in manifest.executables.items()}
    return {
        "route": "executables" if found is not None and not missing else "stablehlo",
        "fingerprint": here.digest,
        "cap": here.cap,
        "missing_buckets": missing,
        "unwritten": found.unwritten if found is not None else {},
        "differences": {} if found is not None else differences,
    }


def _weights(manifest: Manifest) -> list[dict[str, Any]]:
    from lepton_xla.trees import leaf_bytes

    rows: list[dict[str, Any]] = []
    for leaf, disk_bytes in zip(manifest.weights, manifest.disk_bytes(), strict=True):
        size_bytes = leaf_bytes(leaf.shape, leaf.dtype)
        rows.append(
            {
                "name": leaf.path,
                "shape": list(leaf.shape),
                "dtype": leaf.dtype,
                "encoding": leaf.encoding,
                "size_bytes": size_bytes,
                "disk_bytes": disk_bytes,
                "ratio": size_bytes / disk_bytes if disk_bytes else None,
            }
        )
    return rows


def _totals(manifest: Manifest) -> dict[str, Any]:
    """Bytes of all weights, compared with float32."""
    disk_bytes = _common.weights_on_disk(manifest)
    ratio = manifest.float32_bytes / disk_bytes if disk_bytes else None
    return {"weights_bytes_on_disk": disk_bytes, "float32_bytes": manifest.float32_bytes, "float32_ratio": ratio}


def _generation_lines(manifest: Manifest) -> list[str]:
    from lepton_xla.trees import leaf_bytes

    found = manifest.generation
    if found is None:
        return []
    size = sum(leaf_bytes([size for size in t.shape if isinstance(size, int)], t.dtype) for t in found.cache)
    sizes = f"{found.slots} sequences at once, of {found.capacity} positions, {found.vocabulary} tokens"
    text = "with a tokenizer" if found.tokenizer else "token ids only"
    return [f"generates: {sizes}, {text}; cache {_common.size(size)}"]


def _conversion_lines(manifest: Manifest) -> list[str]:
    found = manifest.conversion
    if found is None:
        return []
    taken = [f"takes {name}: {text}" for name, text in found.inputs.items()]
    return [*taken, *(f"gives {name}: {text}" for name, text in found.outputs.items())]


def _master_lines(manifest: Manifest) -> list[str]:
    """What the artifact keeps of its float weights, and what cannot be done again with others."""
    from lepton_xla.trees import leaf_bytes

    master = manifest.master
    if master is None:
        return []
    size = sum(leaf_bytes([size for size in t.shape if isinstance(size, int)], t.dtype) for t in master.weights)
    refused = ", ".join(dict.fromkeys(step.name for step in master.steps if step.reason))
    note = f"; not to be done again with other weights: {refused}" if refused else ""
    return [f"float master: {len(master.weights)} weights, {_common.size(size)}{note}"]


def _print(
    path: str,
    manifest: Manifest,
    signer: str,
    route: Mapping[str, Any],
    weights: Sequence[Mapping[str, Any]],
    size_bytes: int,
) -> None:
    from lepton_xla.cli import _reports

    made = ", ".join(f"{key} {value}" for key, value in manifest.made_by.items() if key != "fingerprint")
    _common.show(
        f"{path}: {manifest.name}, version {manifest.version}, {len(manifest.files)} files, {_common.size(size_bytes)}",
        f"made {manifest.created} with {made}",
        *([f"for {manifest.mesh.count} devices: {manifest.mesh}"] if manifest.mesh is not None else []),
        *_generation_lines(manifest),
        *_conversion_lines(manifest),
        *_master_lines(manifest),
        *_protection_lines(manifest, signer),
        *_route_lines(route),
        "",
    )
    ends = [("input", tensor) for tensor in manifest.inputs] + [("output", tensor) for tensor in manifest.outputs]
    signature = [(kind, t.name, t.dtype, ", ".join(map(str, t.shape)) or "scalar") for kind, t in ends]
    _common.show(_common.table("signature", ("", "name", "dtype", "shape"), signature))
    _common.show(_common.table("buckets", ("bucket", ">compiled in", ">executable"), _bucket_rows(manifest)))
    rows = [
        (
            w["name"],
            "x".join(map(str, w["shape"])) or "scalar",
            w["dtype"],
            w["encoding"],
            f"{w['size_bytes']:,}",
            f"{w['disk_bytes']:,}",
            _times(w["ratio"]),
        )
        for w in weights
    ]
    totals = _totals(manifest)
    memory, disk = sum(weight["size_bytes"] for weight in weights), totals["weights_bytes_on_disk"]
    _common.show(
        _common.table(
            "weights",
            ("name", "shape", "dtype", "encoding", ">bytes", ">on disk", ">smaller"),
            rows,
            total=("total", "", "", "", f"{memory:,}", f"{disk:,}", _times(memory / disk if disk else None)),
        ),
        f"float32 would take {totals['float32_bytes']:,} bytes, {_times(totals['float32_ratio'])} the bytes on disk",
        "",
    )
    _common.show(
        *(_common.table("recipe", ("key", "value"), _flat(manifest.recipe)),) if manifest.recipe else ("no recipe", "")
    )
    if manifest.reports:
        _common.show(_reports.passes_table(manifest.reports), _reports.sites_table(manifest.reports))
        _common.show(_reports.fates_table(manifest.reports), _reports.weights_table(manifest.reports))
        _common.show(*_reports.remarks(manifest.reports))
    if manifest.metrics:
        _common.show(_common.table("metrics", ("metric", ">value"), _flat(manifest.metrics)))
    if manifest.programs_note:
        _common.show(manifest.programs_note)


def _protection_lines(manifest: Manifest, signer: str) -> list[str]:
    lines = [f"certificate: {manifest.certificate}"] if manifest.certificate is not None else []
    lines += [f"signed by the key {signer[:16]}, which `leptonx verify --key` checks"] if signer else []
    if manifest.encryption is not None:
        names = ", ".join(each.key[:16] for each in manifest.encryption.recipients)
        lines.append(f"encrypted with {manifest.encryption.cipher} for {names}")
    return lines


def _times(ratio: float | None) -> str:
    return f"{ratio:.2f}x" if ratio else ""


def _route_lines(route: Mapping[str, Any]) -> list[str]:
    if route["route"] == "executables":
        kind = f" for any CPU with {route['cap']}" if route["cap"] else ""
        return [f"on this machine: loads compiled code{kind} without compiling (fingerprint {route['fingerprint']})"]
    if route["route"] == "shared":
        return [f"weights alone: runs on the compiled code of an artifact that they fit (fit {route['fit'][:12]})"]
    lines = ["on this machine: loading would compile the StableHLO, because"]
    if route["missing_buckets"]:
        lines.append(f"  no compiled code for {'; '.join(route['missing_buckets'])}")
    lines += [f"  XLA could not serialize the code of {name}: {why}" for name, why in route["unwritten"].items()]
    for digest, differences in route["differences"].items():
        lines += [f"  {digest} was compiled for another target: {line}" for line in differences]
    return lines if len(lines) > 1 else [*lines, "  it holds no compiled code"]


def _bucket_rows(manifest: Manifest) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    for executables in manifest.executables.values():
        for bucket, file in executables.files.items():
            took_s = manifest.compile_s.get(bucket)
            rows.append((bucket, _common.seconds(took_s) if took_s else "", _common.size(manifest.files[file].size)))
    return rows


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested dicts and lists to rows of `a.b[0].c` and value."""
    if isinstance(value, Mapping):
        return [row for key, entry in value.items() for row in _flat(entry, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list | tuple):
        return [row for index, entry in enumerate(value) for row in _flat(entry, f"{prefix}[{index}]")]
    return [(prefix, f"{value:.6g}" if isinstance(value, float) else str(value))]
