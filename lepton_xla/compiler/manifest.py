"""`manifest.json`: contents of an artifact, with the size and digest of every other file."""

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
# Name, among those of the buckets, of the program that unpacks stored weights on loading.
EXPAND = "expand"
MAX_MANIFEST_BYTES = 64 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FILE_PART = re.compile(r"[A-Za-z0-9_=,+@-][A-Za-z0-9._=,+@-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of structs that are read from a file; missing, unknown or mistyped keys are errors."""


class Tensor(_Struct, frozen=True, kw_only=True):
    """An input or output; `shape` mixes sizes and symbolic names."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


type Encoding = Literal["plain", "zstd", "raw", "deflate", "gaps"]
"""Encoding of a leaf: a zarr array, `plain` or with `zstd`; or pieces, `raw` or encoded by `entropy`."""


class Piece(_Struct, frozen=True, kw_only=True, array_like=True):
    """A part of a leaf: `size` bytes from `start` of the file `weights/pack-N`, where N is `pack`."""

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
        dtype: its dtype; the stored dtype differs if `packed`.
        packed: whether it is stored as a flat array of bytes, because zarr lacks the dtype or it is narrower than a
            byte.
        encoding: how it is stored; chosen by `save`.
        folder: folder of its zarr array, if it is one.
        pieces: locations of its parts, in order, if it is not a zarr array.
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
        """Whether the leaf is stored as a zarr array."""
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


class FileEntry(_Struct, frozen=True, kw_only=True):
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


class Manifest(_Struct, frozen=True, kw_only=True):
    """The contents of `manifest.json`.

    Attributes:
        schema: version of this layout.
        name: the model's name.
        version: the model's version.
        inputs, outputs: in call order.
        weights: in argument order.
        buckets: symbolic dimension -> sizes.
        programs: portable programs: a single symbolic one, or one per bucket.
        expand: the portable program that unpacks the stored weights, if the buckets' programs take unpacked weights.
        programs_note: why there is no symbolic program for all platforms; empty if there is one.
        executables: fingerprint -> executables.
        compile_s: bucket name -> seconds of compilation.
        recipe, plan: as given to `compile`.
        float32_bytes: bytes of the weights as dense float32 arrays.
        reports: one per applied pass.
        metrics: the user's own metrics, such as accuracy.
        made_by: versions of the software, and the machine.
        created: time of making, UTC, ISO 8601.
        files: every other file of the artifact.
        sha256: digest of this manifest as compact JSON with this field empty, to detect damage to the manifest itself.
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
    """Encode a manifest as indented JSON.

    Raises:
        ArtifactError: if the recipe, the plan, the reports or the metrics are not plain JSON, or the result is too
            large.
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
        if manifest.sha256 != _digest(data):
            raise ArtifactError(f"{MANIFEST}: its SHA-256 does not match: it was edited or damaged")
    except ArtifactError:
        raise
    except (msgspec.MsgspecError, LeptonError, TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{MANIFEST}: {error}") from error
    return manifest


def _digest(data: bytes) -> str:
    """Digest of the JSON with whatever keys it has, so that a later version with more keys computes the same digest."""
    plain = msgspec.json.decode(data, type=dict[str, Any]) | {"sha256": ""}
    return hashlib.sha256(msgspec.json.encode(plain)).hexdigest()


def check_name(name: str) -> str:
    """Return the name if it is valid for a model.

    Raises:
        ArtifactError: if it is not.

    >>> check_name("a/b")
    Traceback (most recent call last):
    lepton_xla.errors.ArtifactError: model name 'a/b': use letters, digits, '.', '_' and '-', at most 128, not '.' first
    """
    if not _NAME.fullmatch(name):
        raise ArtifactError(f"model name {name!r}: use letters, digits, '.', '_' and '-', at most 128, not '.' first")
    return name


def _encode_scalar(value: Any) -> Any:
    """Encode NumPy and JAX scalars, which occur in metrics, as numbers."""
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
            raise ArtifactError(f"{MANIFEST}: executables[{digest!r}] is not the digest of its target")
        for file in executables.files.values():
            _check_listed(manifest, file)


def _check_listed(manifest: Manifest, file: str) -> None:
    if file not in manifest.files:
        raise ArtifactError(f"{MANIFEST}: {file!r} has no entry in files, so its digest is unknown")


def _check_file_name(file: str) -> None:
    """Accepts only plain relative names: no `..`, absolute path, backslash or hidden file."""
    if file == MANIFEST or len(file) > 1024 or not all(_FILE_PART.fullmatch(part) for part in file.split("/")):
        raise ArtifactError(f"{MANIFEST}: {file!r} is not a valid name for a file inside an artifact")
