"""`manifest.json`: contents of an artifact, with the size and digest of every other file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from lepton_xla.certificates import Certificate
from lepton_xla.compiler.buckets import check_bucket_sizes
from lepton_xla.compiler.devices import MeshEntry, Spec
from lepton_xla.compiler.fingerprint import Fingerprint
from lepton_xla.compiler.names import check_name
from lepton_xla.conversion.steps import Summary
from lepton_xla.errors import ArtifactError, LeptonError
from lepton_xla.files.listing import MANIFEST, MAX_MANIFEST_BYTES, FileEntry, check_files, sealing_digest
from lepton_xla.profiles import Profile
from lepton_xla.program import TensorSpec
from lepton_xla.sharding.meshes import mesh_sizes
from lepton_xla.sharding.specs import as_spec, check_axes, check_spec

SCHEMA = 3
# The folder of the zarr array that holds the bytes of packed leaves.
PACKED = "weights/packed"
# Beside the buckets, the names of the steps of generation, and the file of its tokenizer.
DECODE = "decode"
TOKENIZER = "tokenizer.json"
# Beside the buckets, the name of the program that unpacks stored weights when an artifact is loaded.
EXPAND = "expand"
# What is in them is a program, not what was learned, and is never encrypted.
OPEN_FOLDERS = ("programs/", "executables/")


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of structs that are read from a file; missing, unknown or mistyped keys are errors."""


class Tensor(_Struct, frozen=True, kw_only=True):
    """An input or output; `shape` mixes sizes and symbolic names."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


# How a leaf is stored. `plain` and `zstd`: a zarr array of its own, without and with compression. `packed` and `gaps`:
# in the zarr array of bytes that such leaves share, as byte planes or as the streams of `gaps`.
type Encoding = Literal["plain", "zstd", "packed", "gaps"]


class Piece(_Struct, frozen=True, kw_only=True, array_like=True):
    """A part of a leaf: `size` bytes of row `row` of the packed array, from `start`."""

    row: Annotated[int, msgspec.Meta(ge=0)]
    start: Annotated[int, msgspec.Meta(ge=0)]
    size: Annotated[int, msgspec.Meta(ge=0)]


class WeightLeaf(_Struct, frozen=True, kw_only=True):
    """One weight array, in the order of the executables' arguments.

    Attributes:
        path: the weight's path in the program, such as `params/Dense_0/kernel`.
        shape: its shape.
        dtype: its true dtype; the stored one differs where `packed`.
        packed: stored as a flat array of bytes, because zarr has no such dtype or it is narrower than a byte.
        encoding: how it is stored; chosen when it is saved.
        spec: which mesh axes cut which of its axes, if the artifact is for several devices. Its zarr array then has
            chunks that belong to one part each.
        folder: its own zarr array, if it has one.
        pieces: where its parts are in the packed array, if it has no array of its own; in the order of the leaf, one a
            part if `packed`, two (gaps, codes) if `gaps`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    packed: bool
    encoding: Encoding
    spec: Spec = ()
    folder: str = ""
    pieces: tuple[Piece, ...] = ()

    @property
    def is_zarr(self) -> bool:
        """Whether it has a zarr array of its own."""
        return self.encoding in ("plain", "zstd")


class PortableProgram(_Struct, frozen=True, kw_only=True):
    """A serialized StableHLO program; `sizes` is None if its dimensions are symbolic."""

    file: str
    sizes: dict[str, int] | None
    platforms: tuple[str, ...]


class ExecutableSet(_Struct, frozen=True, kw_only=True):
    """Executables for one target.

    Attributes:
        target: the machine and versions that they run on.
        files: bucket name (or `expand`) -> file.
        unwritten: bucket name (or `expand`) -> why XLA could not serialize its code; it is compiled on each load.
    """

    target: Fingerprint
    files: dict[str, str]
    unwritten: dict[str, str] = {}


class Recipient(_Struct, frozen=True, kw_only=True):
    """Who can decrypt: the identifier of a public key, and the data key as it was wrapped for it."""

    key: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    wrapped: Annotated[bytes, msgspec.Meta(max_length=4096)]


class Encryption(_Struct, frozen=True, kw_only=True):
    """How files are encrypted: all but those of `OPEN_FOLDERS`."""

    cipher: Literal["AES-256-GCM"]
    recipients: Annotated[tuple[Recipient, ...], msgspec.Meta(min_length=1, max_length=64)]


class GenerationEntry(_Struct, frozen=True, kw_only=True):
    """How an artifact generates tokens: what `program.Generation` says, and the programs of its two steps.

    Attributes:
        slots, capacity, vocabulary, first_position, end_tokens: as of `program.Generation`.
        cache, axes: the arrays of the cache, for all slots, and the axis of slots in each; () if written by older code.
        prefill, decode: the portable programs of both steps; of prefill one with a symbolic length, or one per length.
        tokenizer: file of the tokenizer; empty without one.
    """

    slots: Annotated[int, msgspec.Meta(ge=1)]
    capacity: Annotated[int, msgspec.Meta(ge=1)]
    vocabulary: Annotated[int, msgspec.Meta(ge=1)]
    first_position: int | None
    end_tokens: tuple[int, ...]
    cache: tuple[Tensor, ...]
    axes: tuple[int, ...] = ()
    prefill: tuple[PortableProgram, ...] = ()
    decode: tuple[PortableProgram, ...] = ()
    tokenizer: str = ""

    def bare(self) -> GenerationEntry:
        """The same without files."""
        return msgspec.structs.replace(self, prefill=(), decode=(), tokenizer="")


class GoldenEntry(_Struct, frozen=True, kw_only=True):
    """Rows whose answers are known, in a file that holds the elements of all tensors one after the other.

    Attributes:
        file: the file.
        inputs: every input of the model, with a shape of sizes.
        outputs: the outputs that are known, likewise.
        tolerance: the largest difference from a known answer, relative to the largest of that output.
        label: the right class of each row, if it is known.
    """

    file: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    tolerance: float
    label: Tensor | None = None


class MasterStep(_Struct, frozen=True, kw_only=True):
    """One step from float weights to stored ones.

    Attributes:
        name: the pass that took it.
        takes: paths of the weights that it reads.
        gives: path of each weight that it sets -> how many arrays that has.
        data: numbers of the arrays that it reads besides, or sets if there is no program.
        program: digest of its program.
        flagged: whether its last output says whether the others are right.
        reason: why it cannot be taken with other weights; empty if it can.
        skippable: whether the weights are usable without it.
    """

    name: str
    takes: tuple[str, ...] = ()
    gives: dict[str, Annotated[int, msgspec.Meta(ge=0)]] = {}
    data: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()
    program: str = ""
    flagged: bool = False
    reason: str = ""
    skippable: bool = False


class MasterCode(_Struct, frozen=True, kw_only=True):
    """Compiled code of steps: the machine that it runs on, and digest of a program -> file."""

    target: Fingerprint
    files: dict[str, str]


class MasterEntry(_Struct, frozen=True, kw_only=True):
    """The float weights that an artifact was made from, and how.

    Attributes:
        file: holds the elements of weights and data one after the other.
        weights: the float weights; their names are paths.
        data: what the steps read besides.
        steps: in order.
        stored: path of the stored weights, in order -> how many arrays each has.
        programs: digest -> file of a portable program.
        code: compiled code.
    """

    file: str
    weights: tuple[Tensor, ...]
    data: tuple[Tensor, ...]
    steps: tuple[MasterStep, ...]
    stored: dict[str, int]
    programs: dict[str, str]
    code: MasterCode


class Manifest(_Struct, frozen=True, kw_only=True):
    """The contents of `manifest.json`.

    Attributes:
        schema: version of this layout.
        name: the model's name.
        version: the model's version.
        inputs, outputs: in call order.
        weights: in argument order.
        mesh: the devices that the executables are for, if there are several.
        packed_rows: bytes used in each row of the packed array; a row is as long as the longest.
        buckets: symbolic dimension -> sizes.
        programs: portable programs: a single symbolic one, or one per bucket.
        expand: the portable program that unpacks the stored weights, if the buckets' programs take unpacked weights.
        unpacked: how the unpacked weights are cut, if there is such a program and a mesh.
        fit: digest of all that compiled code depends on but the values of the weights. Weights of an artifact fit the
            code of every artifact with the same.
        golden: rows whose answers are known, if there are any.
        master: the float weights that it was made from, if it keeps them.
        generation: how it generates tokens, if it does. Its buckets are then those of the length of prompts.
        conversion: what is taken and given instead of some inputs and outputs, if anything is.
        programs_note: why there is no symbolic program for all platforms; empty if there is one.
        executables: fingerprint -> executables.
        compile_s: bucket name -> seconds of compilation.
        recipe, plan: as given to `compile`.
        float32_bytes: bytes of the weights as dense float32 arrays.
        reports: one per applied pass.
        metrics: the user's own metrics, such as accuracy.
        profile: what known inputs and outputs look like, for a server to notice that the data has drifted.
        certificate: what was found of the compressed model when it was made, and what it promises.
        made_by: versions of the software, and the machine.
        encryption: how files are encrypted, if they are; sizes and digests are of what is stored.
        created: time of making, UTC, ISO 8601.
        files: every other file of the artifact.
        sha256: digest of this manifest as compact JSON with this field empty, to detect damage to the manifest itself.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> manifest = lx.compile(program, {"batch": (1, 8)}, name="tiny").save("tiny.lepton")
    >>> manifest.name, manifest.buckets, manifest.is_update, len(manifest.all_programs)
    ('tiny', {'batch': (1, 8)}, False, 1)
    >>> inputs, outputs = manifest.signature()
    >>> inputs == manifest.input_specs(), outputs == manifest.output_specs(), list(outputs)
    (True, True, ['output'])
    >>> 0 < sum(manifest.disk_bytes()) < manifest.size_bytes  # the weights' files, and all files
    True
    """

    schema: int
    name: str
    version: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    weights: tuple[WeightLeaf, ...]
    mesh: MeshEntry | None = None
    packed_rows: tuple[Annotated[int, msgspec.Meta(ge=1)], ...] = ()
    buckets: dict[str, tuple[int, ...]]
    programs: tuple[PortableProgram, ...]
    expand: PortableProgram | None = None
    unpacked: tuple[Spec, ...] = ()
    fit: str = ""
    golden: GoldenEntry | None = None
    master: MasterEntry | None = None
    generation: GenerationEntry | None = None
    conversion: Summary | None = None
    programs_note: str
    executables: dict[str, ExecutableSet]
    compile_s: dict[str, float]
    recipe: Any
    plan: Any
    float32_bytes: int
    reports: tuple[dict[str, Any], ...]
    metrics: dict[str, Any]
    profile: Profile | None = None
    certificate: Certificate | None = None
    made_by: dict[str, Any]
    created: str
    files: dict[str, FileEntry]
    encryption: Encryption | None = None
    sha256: str = ""

    @property
    def is_update(self) -> bool:
        """Whether it has weights only, for the compiled code of another artifact."""
        return not self.programs

    @property
    def all_programs(self) -> tuple[PortableProgram, ...]:
        """The portable programs of the buckets, of the steps of generation, and the one that unpacks weights."""
        steps = (*self.generation.prefill, *self.generation.decode) if self.generation is not None else ()
        return (*self.programs, *((self.expand,) if self.expand is not None else ()), *steps)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.size for entry in self.files.values())

    def signature(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        """Inputs and outputs by name, in order."""
        return self.input_specs(), self.output_specs()

    def input_specs(self) -> dict[str, TensorSpec]:
        """Inputs by name, in call order."""
        return {tensor.name: TensorSpec(tensor.shape, tensor.dtype) for tensor in self.inputs}

    def disk_bytes(self) -> list[int]:
        """Bytes that each leaf takes in the artifact: those of its files, or its share of the packed array's rows."""
        folders = dict.fromkeys((leaf.folder for leaf in self.weights if leaf.is_zarr), 0)
        for name, entry in self.files.items():
            # `weights/00001-kernel/c/0/0` is in the folder of its first two parts.
            folder = "/".join(name.split("/")[:2])
            if folder in folders:
                folders[folder] += entry.size
        shares = [self.files[row_file(row)].size / size for row, size in enumerate(self.packed_rows)]
        return [
            folders[leaf.folder] if leaf.is_zarr else round(sum(shares[each.row] * each.size for each in leaf.pieces))
            for leaf in self.weights
        ]

    def output_specs(self) -> dict[str, TensorSpec]:
        """Outputs by name, in order."""
        return {tensor.name: TensorSpec(tensor.shape, tensor.dtype) for tensor in self.outputs}


class _Head(msgspec.Struct):
    schema: int


def manifest_to_json(manifest: Manifest) -> bytes:
    """Encode a manifest as indented JSON.

    Raises:
        ArtifactError: if the recipe, the plan, the reports or the metrics are not plain JSON, or the result is too
            large.
    """
    try:
        plain = msgspec.json.encode(msgspec.structs.replace(manifest, sha256=""), enc_hook=_encode_scalar)
        sealed = msgspec.json.decode(plain, type=dict[str, Any]) | {"sha256": sealing_digest(plain)}
        data = msgspec.json.format(msgspec.json.encode(sealed), indent=1)
    except (TypeError, ValueError, NotImplementedError, RecursionError, OverflowError) as error:
        raise ArtifactError(f"{MANIFEST}: recipe, plan, reports and metrics must be plain JSON: {error}") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{MANIFEST}: {len(data)} bytes, more than the limit of {MAX_MANIFEST_BYTES}")
    return data


def manifest_from_json(data: bytes) -> Manifest:
    """Decode a manifest and checks everything that can be checked without the other files.

    Raises:
        ArtifactError: if it is invalid; names the file and the key.
    """
    try:
        schema = msgspec.json.decode(data, type=_Head).schema
        if schema != SCHEMA:
            advice = (
                "compile the model again with this version"
                if schema < SCHEMA
                else "load it with the version that made it"
            )
            raise ArtifactError(
                f"{MANIFEST}: schema version {schema}; this version of lepton_xla reads {SCHEMA}: {advice}"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
        _check(manifest)
        if manifest.sha256 != sealing_digest(data):
            raise ArtifactError(f"{MANIFEST}: its SHA-256 does not match: it was edited or damaged")
    except ArtifactError:
        raise
    except (msgspec.MsgspecError, LeptonError, TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{MANIFEST}: {error}") from error
    return manifest


def prefill_name(bucket: str) -> str:
    """The name of the code that reads prompts of a bucket into a slot.

    >>> prefill_name("length=16")
    'prefill,length=16'
    """
    return f"prefill,{bucket}"


def row_file(row: int) -> str:
    """The file that holds a row of the packed array."""
    return f"{PACKED}/c/{row}/0"


def _encode_scalar(value: Any) -> Any:
    """Encode NumPy and JAX scalars, which occur in metrics, as numbers."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def _check(manifest: Manifest) -> None:
    check_name(manifest.name)
    check_files(manifest.files)
    symbols = tuple(dict.fromkeys(name for spec in manifest.input_specs().values() for name in spec.symbols))
    check_bucket_sizes(symbols, manifest.buckets)
    for spec in manifest.output_specs().values():
        check_bucket_sizes(symbols, dict.fromkeys(spec.symbols, (1,)) | manifest.buckets)
    if manifest.mesh is not None:
        mesh_sizes(manifest.mesh.axes, manifest.mesh.count)
        check_axes(manifest.mesh.batch, manifest.mesh.axes, "batch")
        for spec in manifest.unpacked:
            check_axes(spec, manifest.mesh.axes, "unpacked weights")
    rows = manifest.packed_rows or (0,)  # pieces without bytes are in row 0, which need not exist
    for leaf in manifest.weights:
        np.dtype(leaf.dtype)
        if min(leaf.shape, default=0) < 0:
            raise ArtifactError(f"{MANIFEST}: weight {leaf.path!r} has a negative size in its shape {leaf.shape}")
        if leaf.is_zarr:
            _check_listed(manifest, f"{leaf.folder}/zarr.json")
        for piece in leaf.pieces:
            if piece.row >= len(rows) or piece.start + piece.size > rows[piece.row]:
                raise ArtifactError(f"{MANIFEST}: weight {leaf.path!r} has a piece beyond the end of {PACKED}")
        if leaf.spec and manifest.mesh is None:
            raise ArtifactError(f"{MANIFEST}: weight {leaf.path!r} is cut over devices, but there is no mesh")
        if manifest.mesh is not None:
            check_spec(as_spec(leaf.spec), leaf.shape, manifest.mesh.axes, f"weight {leaf.path!r}")
    if manifest.packed_rows:
        _check_listed(manifest, f"{PACKED}/zarr.json")
    for row in range(len(manifest.packed_rows)):
        _check_listed(manifest, row_file(row))
    for entry in filter(None, (*manifest.all_programs, manifest.golden, manifest.conversion)):
        _check_listed(manifest, entry.file)
    if manifest.master is not None:
        _check_master(manifest, manifest.master)
    if manifest.generation is not None and manifest.generation.tokenizer:
        _check_listed(manifest, manifest.generation.tokenizer)
    if manifest.is_update and (manifest.executables or not manifest.fit):
        raise ArtifactError(f"{MANIFEST}: has no program, and is no update of weights either")
    for digest, executables in manifest.executables.items():
        if executables.target.digest != digest:
            raise ArtifactError(f"{MANIFEST}: executables[{digest!r}] is not the digest of its target")
        for file in executables.files.values():
            _check_listed(manifest, file)


def _check_master(manifest: Manifest, master: MasterEntry) -> None:
    """Check that what the steps of a float master refer to is there."""
    for file in (master.file, *master.programs.values(), *master.code.files.values()):
        _check_listed(manifest, file)
    for tensor in (*master.weights, *master.data):
        np.dtype(tensor.dtype)
        if any(isinstance(size, str) or size < 0 for size in tensor.shape):
            raise ArtifactError(f"{MANIFEST}: {tensor.name!r} of the float master has the shape {tensor.shape}")
    known = {tensor.name for tensor in master.weights}
    for step in master.steps:
        where = f"{MANIFEST}: step {step.name!r} of the float master"
        if step.reason:  # it is never taken
            known |= set(step.gives)
            continue
        for path in step.takes:
            if path not in known:
                raise ArtifactError(f"{where} takes {path!r}, which is not there")
        if step.program and step.program not in master.programs:
            raise ArtifactError(f"{where} has no program")
        if any(number >= len(master.data) for number in step.data):
            raise ArtifactError(f"{where} reads data that is not there")
        known |= set(step.gives)
    for path in master.stored:
        if path not in known:
            raise ArtifactError(f"{MANIFEST}: the float master does not give weight {path!r}")
    if sum(master.stored.values()) != len(manifest.weights):
        raise ArtifactError(f"{MANIFEST}: the float master does not give as many weights as there are")


def _check_listed(manifest: Manifest, file: str) -> None:
    if file not in manifest.files:
        raise ArtifactError(f"{MANIFEST}: {file!r} has no entry in files, so its digest is unknown")
