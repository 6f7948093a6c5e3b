"""`manifest.json`: what an artifact holds, and the size and digest of every other file in it."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import msgspec

from lepton_xla.compiler.buckets import check_ladders
from lepton_xla.compiler.fingerprint import Fingerprint
from lepton_xla.errors import ArtifactError, LeptonError
from lepton_xla.program import TensorSpec

MANIFEST = "manifest.json"
SCHEMA = 2
# Beside the buckets, the name of the program that unpacks stored weights when an artifact is loaded.
EXPAND = "expand"
MAX_MANIFEST_BYTES = 64 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FILE_PART = re.compile(r"[A-Za-z0-9_=,+@-][A-Za-z0-9._=,+@-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Read from a file: a key that is missing, unknown or of another type is an error."""


class Tensor(_Struct, frozen=True, kw_only=True):
    """An input or output; `shape` mixes sizes and symbolic names."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


type Encoding = Literal["plain", "zstd", "raw", "deflate", "gaps"]
"""How a leaf is stored: a zarr array, plain or under zstd; or pieces, raw or by `entropy`."""


class Piece(_Struct, frozen=True, kw_only=True, array_like=True):
    """A part of a leaf: `size` bytes of the file `weights/pack-N`, N being `pack`, from `start`."""

    pack: Annotated[int, msgspec.Meta(ge=0)]
    start: Annotated[int, msgspec.Meta(ge=0)]
    size: Annotated[int, msgspec.Meta(ge=0)]

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"weights/pack-{self.pack:05d}"


class WeightLeaf(_Struct, frozen=True, kw_only=True):
    """One weight array, in the order of the executables' arguments.

    Attributes:
        path: the weight's path in the program, such as `params/Dense_0/kernel`.
        shape: its shape.
        dtype: its true dtype; the stored one differs where `packed`.
        packed: stored as a flat array of bytes, because zarr has no such dtype or it is narrower than a byte.
        encoding: how it is stored; chosen when it is saved.
        folder: where its zarr array is, if it is one.
        pieces: where its parts are, if it is not, in the order of the leaf.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    packed: bool
    encoding: Encoding
    folder: str = ""
    pieces: tuple[Piece, ...] = ()

    @property
    def is_zarr(self) -> bool:
        """Whether it is a zarr array."""
        return self.encoding in ("plain", "zstd")


class PortableProgram(_Struct, frozen=True, kw_only=True):
    """A serialized StableHLO program; `sizes` is None where its dimensions are symbolic."""

    file: str
    sizes: dict[str, int] | None
    platforms: tuple[str, ...]


class ExecutableSet(_Struct, frozen=True, kw_only=True):
    """Executables for one target.

    Attributes:
        target: what they run on.
        files: bucket name (or `expand`) -> file.
        unwritten: bucket name (or `expand`) -> why XLA could not write its code; it is compiled at each loading.
    """

    target: Fingerprint
    files: dict[str, str]
    unwritten: dict[str, str] = {}


class FileEntry(_Struct, frozen=True, kw_only=True):
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


class Manifest(_Struct, frozen=True, kw_only=True):
    """The whole of `manifest.json`.

    Attributes:
        schema: version of this layout.
        name: the model's name.
        version: the model's version.
        inputs, outputs: in call order.
        weights: in argument order.
        buckets: symbolic dimension -> sizes.
        programs: portable programs; one symbolic, or one a bucket.
        expand: the portable program that unpacks the stored weights, if the buckets' programs take unpacked ones.
        programs_note: why there is no symbolic program, or not for all platforms; empty where there is.
        executables: fingerprint -> executables.
        compile_s: bucket name -> seconds its compilation took.
        recipe, plan: as given to `compile`.
        float32_bytes: what the weights would take as float32 arrays, zeros and all.
        reports: one a pass applied.
        metrics: the user's own figures, such as accuracy.
        made_by: versions of the software, and the machine.
        created: time of making, UTC, ISO 8601.
        files: every other file of the artifact.
        sha256: digest of this manifest as compact JSON with this field empty, so that damage to it is seen too.
    """

    schema: int
    name: str
    version: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    weights: tuple[WeightLeaf, ...]
    buckets: dict[str, tuple[int, ...]]
    programs: tuple[PortableProgram, ...]
    expand: PortableProgram | None = None
    programs_note: str
    executables: dict[str, ExecutableSet]
    compile_s: dict[str, float]
    recipe: Any
    plan: Any
    float32_bytes: int
    reports: tuple[dict[str, Any], ...]
    metrics: dict[str, Any]
    made_by: dict[str, Any]
    created: str
    files: dict[str, FileEntry]
    sha256: str = ""

    def input_specs(self) -> dict[str, TensorSpec]:
        """Inputs by name, in call order."""
        return {tensor.name: TensorSpec(tensor.shape, tensor.dtype) for tensor in self.inputs}

    def output_specs(self) -> dict[str, TensorSpec]:
        """Outputs by name, in order."""
        return {tensor.name: TensorSpec(tensor.shape, tensor.dtype) for tensor in self.outputs}


class _Head(msgspec.Struct):
    schema: int


def encode(manifest: Manifest) -> bytes:
    """The file's content: indented JSON.

    Raises:
        ArtifactError: where the recipe, the plan, the reports or the metrics are not plain JSON, or it is too large.
    """
    try:
        plain = msgspec.json.encode(msgspec.structs.replace(manifest, sha256=""), enc_hook=_encode_scalar)
        sealed = msgspec.json.decode(plain, type=dict[str, Any]) | {"sha256": _digest(plain)}
        data = msgspec.json.format(msgspec.json.encode(sealed), indent=1)
    except (TypeError, ValueError, NotImplementedError, RecursionError, OverflowError) as error:
        raise ArtifactError(f"{MANIFEST}: recipe, plan, reports and metrics must be plain JSON: {error}") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{MANIFEST}: {len(data)} bytes, more than the limit of {MAX_MANIFEST_BYTES}")
    return data


def decode(data: bytes) -> Manifest:
    """Reads the file's content and checks all that can be checked without the other files.

    Raises:
        ArtifactError: naming the file and the key at fault.
    """
    try:
        schema = msgspec.json.decode(data, type=_Head).schema
        if schema != SCHEMA:
            advice = "compile the model again with this one" if schema < SCHEMA else "load it with the one that made it"
            raise ArtifactError(
                f"{MANIFEST}: schema version {schema}; this version of lepton_xla reads {SCHEMA}: {advice}"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
        _check(manifest)
        if manifest.sha256 != _digest(data):
            raise ArtifactError(f"{MANIFEST}: its SHA-256 is not the one it states: it was edited or damaged")
    except ArtifactError:
        raise
    except (msgspec.MsgspecError, LeptonError, TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{MANIFEST}: {error}") from error
    return manifest


def _digest(data: bytes) -> str:
    """Of the JSON as it stands, whatever its keys, so that a later version with more keys computes the same."""
    plain = msgspec.json.decode(data, type=dict[str, Any]) | {"sha256": ""}
    return hashlib.sha256(msgspec.json.encode(plain)).hexdigest()


def check_name(name: str) -> str:
    """The name, if it can be a model's.

    Raises:
        ArtifactError: otherwise.
    """
    if not _NAME.fullmatch(name):
        raise ArtifactError(f"model name {name!r}: use letters, digits, '.', '_' and '-', at most 128, not '.' first")
    return name


def _encode_scalar(value: Any) -> Any:
    """NumPy and JAX scalars, which metrics often are, as numbers."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def _check(manifest: Manifest) -> None:
    check_name(manifest.name)
    for file, entry in manifest.files.items():
        _check_file_name(file)
        if entry.size < 0 or not _SHA256.fullmatch(entry.sha256):
            raise ArtifactError(f"{MANIFEST}: files[{file!r}] has no valid size and SHA-256")
    symbols = tuple(dict.fromkeys(name for spec in manifest.input_specs().values() for name in spec.symbols))
    check_ladders(symbols, manifest.buckets)
    for spec in manifest.output_specs().values():
        check_ladders(symbols, dict.fromkeys(spec.symbols, (1,)) | manifest.buckets)
    for leaf in manifest.weights:
        jnp.dtype(leaf.dtype)
        if min(leaf.shape, default=0) < 0:
            raise ArtifactError(f"{MANIFEST}: weight {leaf.path!r} has a negative size in its shape {leaf.shape}")
        if leaf.is_zarr:
            _check_listed(manifest, f"{leaf.folder}/zarr.json")
        for piece in leaf.pieces:
            _check_listed(manifest, piece.file)
            if piece.start + piece.size > manifest.files[piece.file].size:
                raise ArtifactError(f"{MANIFEST}: weight {leaf.path!r} has a piece beyond the end of {piece.file}")
    for program in (*manifest.programs, *((manifest.expand,) if manifest.expand else ())):
        _check_listed(manifest, program.file)
    for digest, executables in manifest.executables.items():
        if executables.target.digest != digest:
            raise ArtifactError(f"{MANIFEST}: executables[{digest!r}] is not the digest of the target beside it")
        for file in executables.files.values():
            _check_listed(manifest, file)


def _check_listed(manifest: Manifest, file: str) -> None:
    if file not in manifest.files:
        raise ArtifactError(f"{MANIFEST}: {file!r} has no entry in files, so no digest; it is not used without one")


def _check_file_name(file: str) -> None:
    """Only plain relative names: no `..`, no absolute path, no backslash, nothing hidden."""
    if file == MANIFEST or len(file) > 1024 or not all(_FILE_PART.fullmatch(part) for part in file.split("/")):
        raise ArtifactError(f"{MANIFEST}: {file!r} is not a valid name for a file inside an artifact")
