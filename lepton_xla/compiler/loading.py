"""Loads an artifact: checks digests, then loads compiled code if it fits this machine, else compiles the StableHLO."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from lepton_xla.arguments import takes
from lepton_xla.compiler import _xla
from lepton_xla.compiler.buckets import BucketSizes, bucket_name, combinations
from lepton_xla.compiler.code import Code
from lepton_xla.compiler.devices import Devices, devices_here
from lepton_xla.compiler.fingerprint import Fingerprint
from lepton_xla.compiler.fitting import check_fit, check_weights
from lepton_xla.compiler.golden import Golden
from lepton_xla.compiler.instruction_sets import CAPS, cap_in, needed_features
from lepton_xla.compiler.manifest import (
    DECODE,
    EXPAND,
    ExecutableSet,
    Manifest,
    PortableProgram,
    manifest_to_json,
    prefill_name,
)
from lepton_xla.compiler.opening import is_signed, open_files, read_manifest, read_trusted_manifest, trusted_keys
from lepton_xla.compiler.portable import compile_portable
from lepton_xla.compiler.reading import check_placed, read_all, read_parts, shared
from lepton_xla.compiler.runtime import Runtime, run_expand
from lepton_xla.compiler.servable import Servable
from lepton_xla.compiler.sharing import Shared, shared_code
from lepton_xla.compiler.stepping import Stepper, decode_inputs, donation, prefill_inputs
from lepton_xla.compiler.storage import Store, VerifiedFiles, consistently
from lepton_xla.conversion.steps import Conversion
from lepton_xla.deferred import jax
from lepton_xla.environment.flags import warn_of_slow_flags
from lepton_xla.errors import ArtifactError, ExecutionError, ShardingError
from lepton_xla.files.listing import MANIFEST, FileEntry
from lepton_xla.pieces import executor, rest
from lepton_xla.trees import leaf_bytes
from lepton_xla.trust.keys import TrustedKeys

_LOG = logging.getLogger(__name__)


@takes(
    location=(str, os.PathLike),
    buckets=Mapping,
    trust=(str, os.PathLike, TrustedKeys),
    decrypt_key=(str, os.PathLike),
    base=Servable,
    device=int,
)
def load(
    location: str | os.PathLike[str],
    *,
    buckets: Mapping[str, Sequence[int]] | None = None,
    write_back: bool = False,
    trust: str | os.PathLike[str] | TrustedKeys | None = None,
    decrypt_key: str | os.PathLike[str] | None = None,
    base: Servable | None = None,
    check: bool = False,
    device: int = 0,
) -> Servable:
    """Load an artifact onto one of this process's devices, or the first ones if it was compiled for several.

    Checks every file against its digest before executing anything. If the artifact has compiled code for this machine
    and version, loading does not compile. Otherwise it compiles the portable program for each bucket without code, and
    logs a warning with the reason. An artifact for several devices runs on one if there are fewer and its weights fit.

    Args:
        location: a local folder, or a `gs://` or `s3://` prefix.
        buckets: symbolic dimension -> the compiled sizes to load; by default all.
        write_back: whether to add newly compiled code to the artifact, for the next load. A failure is logged as a
            warning.
        trust: a public key or a folder of public keys, one of which must have signed the artifact: else nothing of it
            is used. None loads any artifact.
        decrypt_key: file of the private key, if the artifact is encrypted; by default what the environment variable
            `LEPTON_DECRYPT_KEY` holds, the key itself or the path of its file.
        base: a loaded model whose compiled code is used, with its buckets, if these weights fit it; see
            `make_update`. An artifact of weights alone needs one.
        check: whether to refuse weights that are not finite, or are others on the device than in the artifact, and an
            artifact that answers its golden rows wrong; all is always checked for an artifact of weights alone.
            Infinite weights are refused only if the base's are finite.
        device: number of the device, counted from 0. Where `base` is given it is that of the base.

    Raises:
        ArtifactError: if a file is missing, damaged or foreign, the artifact lacks a bucket, its weights do not fit the
            base, or fail a check; names it.
        TrustError: if it is not signed by a trusted key, or cannot be decrypted.
        ExecutionError: if there is no such device, or the weights cannot be unpacked on it.
        ShardingError: if there are fewer devices than the artifact was compiled for, and its weights do not fit on one.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> manifest = lx.compile(program, {"batch": (1,)}).save("tiny.lepton")
    >>> lx.load("tiny.lepton")(x=[[1.0, 2.0, 3.0, 4.0]])["output"]
    array([[1., 2., 3., 4.]], dtype=float32)
    """
    if base is not None and buckets is not None:
        raise ArtifactError(f"{os.fsdecode(location)}: buckets are those of the base; give one or the other")

    trusted = trusted_keys(trust)

    def checked(store: Store) -> Servable:
        # The signature pins the bytes of the manifest, and these pin those of all other files, which are read once.
        manifest = read_trusted_manifest(store, trusted)
        rest()
        files = open_files(store, manifest, decrypt_key)
        if manifest.is_update or (base is not None and manifest.fit and manifest.fit == base.manifest.fit):
            servable = _share(store, manifest, files, base)
        else:
            servable = _load(store, manifest, files, buckets, device, trusted, write_back=write_back, read_back=check)
        rest()
        if check or manifest.is_update:
            check_weights(servable, base, store.location)
            if manifest.golden is not None:
                golden = Golden.read(manifest.golden, files.read(manifest.golden.file))
                golden.check(servable.compute, store.location)
        return servable

    return consistently(location, checked)


def _share(store: Store, manifest: Manifest, files: VerifiedFiles, base: Servable | None) -> Servable:
    """Load the weights of an artifact for the compiled code of a model that is loaded."""
    if base is None:
        raise ArtifactError(
            f"{store.location} has weights only: load it with base=, a loaded model that they fit, or serve it from a "
            "repository that has one"
        )
    check_fit(manifest, base.manifest, store.location)
    devices = base.runtime.devices
    # What is not needed here will be elsewhere, or when the base is gone: a damaged artifact is refused as a whole.
    found = manifest.executables.get(_target(manifest, devices).digest)
    rest()
    for file in (
        *(program.file for program in manifest.all_programs),
        *(found.files.values() if found is not None else ()),
    ):
        files.read(file)
    tokenizer = _tokenizer(manifest, files) or base.tokenizer
    arrays = _to_devices(manifest, files, devices, read_back=True)
    rest()
    if base.expander is not None:
        arrays = run_expand(base.expander, arrays, devices, base.manifest.unpacked)
    if devices.mesh is None and devices.first.platform == "cpu":
        arrays = shared(arrays, base.runtime.weights, devices.read)
    runtime = base.runtime.sharing(arrays)
    steps = base.stepper.sharing(runtime) if base.stepper is not None else None
    conversion = base.conversion if manifest.is_update else _conversion(manifest, files)
    return Servable(manifest, base.buckets, runtime, "shared", base.expander, steps, tokenizer, conversion)


def _load(
    store: Store,
    manifest: Manifest,
    files: VerifiedFiles,
    buckets: Mapping[str, Sequence[int]] | None,
    device: int,
    trusted: TrustedKeys | None,
    *,
    write_back: bool,
    read_back: bool,
) -> Servable:
    bucket_sizes = _choose(manifest, buckets)
    devices = _devices(manifest, store.location, device, quick=manifest.generation is None)
    warn_of_slow_flags(_LOG, devices.first.platform)
    target = _target(manifest, devices)
    wanted = [(sizes, bucket_name(sizes)) for sizes in combinations(bucket_sizes)]
    found = manifest.executables.get(target.digest)
    known = found.files if found is not None else {}
    if target.cap and found is not None:
        _LOG.info("%s: code for any CPU with %s, the best for this machine", store.location, target.cap)
    steps = [*(prefill_name(key) for _, key in wanted), DECODE] if manifest.generation is not None else []
    names = [*((EXPAND,) if manifest.expand else ()), *(key for _, key in wanted), *steps]
    missing = [name for name in names if name not in known]
    # All bytes are read and verified here; later steps trust them.
    portable = {program.file: files.read(program.file) for program in manifest.all_programs}
    blobs = {name: files.read(known[name]) for name in names if name in known}
    if _xla.is_quick(devices.first) and (missing or any(map(_xla.needs_jax, blobs.values()))):
        devices = _devices(manifest, store.location, device)
    tokenizer, conversion = _tokenizer(manifest, files), _conversion(manifest, files)
    # What `fit` says is not checked here: code is shared among those alone who trust the same keys, and one compiler.
    keys = None if trusted is None else sorted(trusted.keys)
    compiled = str([manifest.fit, target.digest, sorted(manifest.made_by.items()), keys]) if manifest.fit else ""
    with executor(max(len(blobs), 1), "lepton-code") as pool:
        # Largest first, and beside the weights, which are read and verified meanwhile.
        ordered = sorted(blobs, key=lambda name: -len(blobs[name]))
        read = pool.map(lambda name: shared_code(blobs[name], devices.all, name, compiled), ordered)
        arrays = _to_devices(manifest, files, devices, read_back=read_back)
        found_code: dict[str, Shared] = dict(zip(ordered, read, strict=True))
    codes = {name: Code(each.loaded, blobs[name]) for name, each in found_code.items()}
    if missing:
        count = len([name for name in missing if name != EXPAND and name not in steps]) or "no"
        _LOG.warning(
            "%s: compiling %s buckets from StableHLO: %s", store.location, count, _why(manifest, target, missing)
        )
    if manifest.expand is not None:
        if EXPAND in missing:
            unpacking = devices.unpacking(arrays, manifest.unpacked)
            codes[EXPAND] = _compile(manifest.expand, portable, arrays, [], unpacking)
        arrays = run_expand(codes[EXPAND].loaded, arrays, devices, manifest.unpacked)
    specs = manifest.input_specs().values()
    for sizes, key in wanted:
        if key in missing:
            program = _program_for(manifest.programs, sizes)
            shapes = [spec.at(sizes) for spec in specs]
            codes[key] = _compile(program, portable, arrays, shapes, devices.shardings(arrays, *manifest.signature()))
        if manifest.generation is not None and prefill_name(key) in missing:
            program = _program_for(manifest.generation.prefill, sizes)
            shapes = prefill_inputs(manifest.generation, sizes)
            codes[prefill_name(key)] = _compile(program, portable, arrays, shapes, donation(arrays, 3, shapes, devices))
    if manifest.generation is not None and DECODE in missing:
        program, shapes = _program_for(manifest.generation.decode, {}), decode_inputs(manifest.generation)
        codes[DECODE] = _compile(program, portable, arrays, shapes, donation(arrays, 2, shapes, devices))
    runtime = Runtime(*manifest.signature(), arrays, devices, list(found_code.values()))
    for sizes, key in wanted:
        runtime.add(sizes, codes[key].loaded)
    if write_back and missing and not devices.is_usual:
        _LOG.warning("%s: the compiled code was not written back: it names %s", store.location, devices.first)
    elif write_back and missing:
        _write_back(store, manifest, target, {name: codes[name] for name in missing})
    expander = codes[EXPAND].loaded if manifest.expand is not None else None
    loaded = {name: code.loaded for name, code in codes.items()}
    stepper = Stepper.of(manifest, bucket_sizes, loaded, runtime) if manifest.generation is not None else None
    route = "stablehlo" if missing else "executables"
    return Servable(manifest, bucket_sizes, runtime, route, expander, stepper, tokenizer, conversion)


def _target(manifest: Manifest, devices: Devices) -> Fingerprint:
    targets = [entry.target for entry in manifest.executables.values()]
    return Fingerprint.of(devices.first, len(devices.all)).best(targets)


def _choose(manifest: Manifest, buckets: Mapping[str, Sequence[int]] | None) -> BucketSizes:
    bucket_sizes: BucketSizes = {name: tuple(compiled_sizes) for name, compiled_sizes in manifest.buckets.items()}
    for name, sizes in (buckets or {}).items():
        missing = [size for size in sizes if size not in bucket_sizes.get(name, ())]
        if name not in bucket_sizes or missing or not sizes:
            raise ArtifactError(f"bucket {name}={missing or list(sizes)} is not in the artifact; it has {bucket_sizes}")
        bucket_sizes[name] = tuple(sorted(set(sizes)))
    return bucket_sizes


def _devices(manifest: Manifest, location: str, number: int, *, quick: bool = False) -> Devices:
    """The devices that an artifact was compiled for; one if there are fewer and the weights fit there."""
    entry = manifest.mesh
    first = _xla.device_numbered(number, quick=quick and entry is None)
    if entry is None or devices_here(entry) == entry.count:
        return Devices.of(entry, number) if entry is not None else Devices(first)
    needed = sum(leaf_bytes(leaf.shape, leaf.dtype) for leaf in manifest.weights)
    there = _xla.memory_bytes(first)
    said = f"{location}: compiled for {entry.count} devices ({entry}), and there are {len(jax.devices())}"
    if there is not None and needed > there:
        raise ShardingError(
            f"{said}; its weights take {needed} bytes, and one device has {there}. Load it where there are "
            f"{entry.count} devices, or compile it for a smaller mesh"
        )
    _LOG.warning("%s: running on one", said)
    return Devices(first)


def _to_devices(manifest: Manifest, files: VerifiedFiles, devices: Devices, *, read_back: bool) -> list[jax.Array]:
    try:
        if devices.mesh is not None:
            return read_parts(manifest.weights, manifest.packed_rows, files, devices, read_back=read_back)
        arrays = read_all(manifest.weights, manifest.packed_rows, files)
        # Arrays start on a 64-byte boundary, so on the CPU the device arrays share their memory.
        placed = [devices.put(array) for array in arrays]
        for leaf, array, there in zip(manifest.weights, arrays, placed, strict=True) if read_back else ():
            check_placed(leaf.path, array, there, devices.first)
        return placed
    except _xla.ERROR as error:
        raise ExecutionError(f"the weights cannot be put on {devices.first}: {_xla.reason(error)}") from error


def _tokenizer(manifest: Manifest, files: VerifiedFiles) -> bytes:
    """The tokenizer of a model that generates; empty without one."""
    name = manifest.generation.tokenizer if manifest.generation is not None else ""
    return files.read(name) if name else b""


def _conversion(manifest: Manifest, files: VerifiedFiles) -> Conversion | None:
    """The steps on the host before and after compiled code, if there are any."""
    return Conversion.from_json(files.read(manifest.conversion.file)) if manifest.conversion is not None else None


def _program_for(programs: Sequence[PortableProgram], sizes: dict[str, int]) -> PortableProgram:
    for program in programs:
        if program.sizes is None or program.sizes == sizes:
            return program
    raise ArtifactError(f"{MANIFEST}: no portable program for bucket {bucket_name(sizes)}")


def _compile(
    program: PortableProgram,
    portable: Mapping[str, bytes],
    weights: Sequence[jax.Array],
    inputs: Sequence[jax.ShapeDtypeStruct],
    shardings: Mapping[str, Any] | None = None,
) -> Code:
    # What an executable has unpacked knows no shape of its own.
    leaves = [None if leaf.aval is None else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in weights]
    return compile_portable(portable[program.file], program.file, leaves, inputs, shardings)


def _why(manifest: Manifest, target: Fingerprint, missing: Sequence[str]) -> str:
    if (found := manifest.executables.get(target.digest)) is not None:
        unwritten = [f"XLA could not serialize the code of {name}: {why}" for name, why in found.unwritten.items()]
        lacking = [name for name in missing if name not in found.unwritten]
        return "; ".join([*unwritten, *([f"there is no code for {', '.join(lacking)}"] if lacking else [])])
    nearest = [target.differences(entry.target) for entry in manifest.executables.values()]
    return "; ".join(min(nearest, key=len)) if nearest else "the artifact has no executables"


def _written_for(target: Fingerprint, made: Mapping[str, Code]) -> Fingerprint:
    """The target of new code: under a cap on instructions, every CPU that has what the code needs."""
    if target.platform != "cpu" or cap_in(target.xla_flags) not in CAPS or any(c.calls_kernels for c in made.values()):
        return target
    needed = [needed_features(code.blob) for code in made.values() if code.blob is not None]
    known = [features for features in needed if features is not None]
    return target.capped(frozenset().union(*known)) if known and len(known) == len(needed) else target


def _write_back(store: Store, loaded: Manifest, target: Fingerprint, made: Mapping[str, Code]) -> None:
    """Add executables to an artifact. The manifest is replaced last, so readers see the old or the new state."""
    try:
        if is_signed(store):
            raise ArtifactError(f"{store.location}: it is signed, and new files would void the signature")
        manifest = read_manifest(store)
        target = target if target.digest in manifest.executables else _written_for(target, made)
        programs = [program.file for program in loaded.all_programs]
        if store.is_replaced or any(manifest.files.get(name) != loaded.files[name] for name in programs):
            raise ArtifactError(f"{store.location}: another artifact has taken its place")
        files, names = dict(manifest.files), {}
        known = manifest.executables.get(target.digest)
        unwritten = dict(known.unwritten) if known else {}
        for key, code in made.items():
            if code.blob is None:
                unwritten[key] = code.why_none
                continue
            blob = code.blob
            digest = hashlib.sha256(blob).hexdigest()
            # Named by content, so that concurrent write-backs cannot replace each other's files.
            names[key] = f"executables/{target.digest}/{key}-{digest[:8]}.xla"
            store.write(names[key], blob)
            files[names[key]] = FileEntry(size=len(blob), sha256=digest)
            unwritten.pop(key, None)
        added = ExecutableSet(target=target, files=(dict(known.files) if known else {}) | names, unwritten=unwritten)
        sets = {**manifest.executables, target.digest: added}
        store.write(MANIFEST, manifest_to_json(msgspec.structs.replace(manifest, files=files, executables=sets)))
    except ArtifactError as error:
        _LOG.warning("the compiled code was not written back: %s", error)
