"""An artifact: a compiled model as a folder of files, each with its digest in the manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import msgspec

from lepton_xla.arguments import takes
from lepton_xla.certificates import Certificate
from lepton_xla.compiler import weights
from lepton_xla.compiler.buckets import bucket_name, combinations
from lepton_xla.compiler.code import Code
from lepton_xla.compiler.devices import Devices
from lepton_xla.compiler.golden import Golden
from lepton_xla.compiler.manifest import (
    DECODE,
    EXPAND,
    TOKENIZER,
    Manifest,
    PortableProgram,
    manifest_to_json,
    prefill_name,
)
from lepton_xla.compiler.masters import Master
from lepton_xla.compiler.opening import check_signed_files, read_manifest, read_signature, trusted_keys
from lepton_xla.compiler.portable import Portable
from lepton_xla.compiler.profiling import profile
from lepton_xla.compiler.runtime import Runtime, run_expand
from lepton_xla.compiler.servable import Servable
from lepton_xla.compiler.stepping import CompiledSteps, Stepper
from lepton_xla.compiler.storage import Store, VerifiedFiles, atomic_store, consistently
from lepton_xla.conversion.steps import FILE, Conversion, Summary
from lepton_xla.errors import ArtifactError
from lepton_xla.files.listing import MANIFEST, FileEntry
from lepton_xla.trust.bundles import SIGNATURE, utc
from lepton_xla.trust.keys import TrustedKeys


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A compiled model in memory.

    Attributes:
        manifest: description of the model. `save` fills in `files`, the storage of weights, and the file names of
            programs and executables.
        weights: device arrays as stored, in argument order.
        executables: bucket name -> compiled code for `devices`; also under `expand`, if there is an
            `expand` program.
        programs: the portable programs.
        expand: the portable program that unpacks the stored weights, if the buckets' programs take unpacked weights;
            else None.
        devices: what the executables were compiled for; by default this process's first device.
        golden: rows whose answers are known, if there are any.
        master: the float weights that it was made from, if they are kept.
        elsewhere: fingerprint -> compiled code, as `executables`, for devices that are not here.
        steps: the portable programs of generation, if it generates, and its tokenizer.
        conversion: the steps on the host before and after compiled code, if there are any.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> artifact = lx.compile(program, {"batch": (1,)}, name="tiny")
    >>> artifact.servable()(x=np.ones((2, 4), np.float32))["output"].shape, artifact.save("tiny.lepton").name
    ((2, 4), 'tiny')
    """

    manifest: Manifest
    weights: tuple[jax.Array, ...]
    executables: dict[str, Code]
    programs: tuple[Portable, ...]
    expand: Portable | None = None
    devices: Devices | None = None
    golden: Golden | None = None
    master: Master | None = None
    elsewhere: Mapping[str, dict[str, Code]] = dataclasses.field(default_factory=dict[str, dict[str, Code]])
    steps: CompiledSteps | None = None
    conversion: Conversion | None = None

    def save(self, location: str | os.PathLike[str], *, overwrite: bool = False) -> Manifest:
        """Write the artifact, atomically.

        Args:
            location: a local folder (by custom `NAME.lepton`), or a `gs://` or `s3://` prefix.
            overwrite: whether to replace an existing artifact.

        Returns:
            The manifest as written.

        Raises:
            ArtifactError: if the location exists or cannot be written; nothing is left behind then.
        """
        with atomic_store(location, overwrite=overwrite) as store:
            files: dict[str, FileEntry] = {}

            def write(name: str, data: bytes) -> None:
                store.write(name, data)
                files[name] = FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())

            leaves, packed_rows = weights.write_all(self.manifest.weights, self.weights, write, self.manifest.mesh)

            def write_program(program: Portable, stem: str) -> PortableProgram:
                name = f"programs/{stem}.stablehlo"
                write(name, program.blob)
                return PortableProgram(file=name, sizes=program.sizes, platforms=program.platforms)

            programs = tuple(write_program(program, program.name) for program in self.programs)
            expand = write_program(self.expand, EXPAND) if self.expand is not None else None
            sets = {
                digest: msgspec.structs.replace(entry, files={}) for digest, entry in self.manifest.executables.items()
            }
            for digest, entry in sets.items():
                for key, code in self.elsewhere.get(digest, self.executables).items():
                    if code.blob is None:
                        continue
                    name = f"executables/{digest}/{key}.xla"
                    write(name, code.blob)
                    entry.files[key] = name
            if self.conversion is not None:
                write(FILE, self.conversion.to_json())
            if self.golden is not None:
                write(self.golden.entry().file, self.golden.data())
            generation = self.manifest.generation
            if self.steps is not None and generation is not None:
                if self.steps.tokenizer:
                    write(TOKENIZER, self.steps.tokenizer)
                generation = msgspec.structs.replace(
                    generation,
                    prefill=tuple(write_program(each, prefill_name(each.name)) for each in self.steps.prefill),
                    decode=tuple(write_program(each, DECODE) for each in self.steps.decode),
                    tokenizer=TOKENIZER if self.steps.tokenizer else "",
                )
            master = self.master.write(write) if self.master is not None else None
            manifest = msgspec.structs.replace(
                self.manifest,
                master=master,
                generation=generation,
                conversion=self.conversion and Summary.of(self.conversion),
                golden=self.golden.entry() if self.golden is not None else None,
                files=files,
                weights=leaves,
                packed_rows=packed_rows,
                programs=programs,
                expand=expand,
                executables=sets,
            )
            # Written last: in an object store the artifact exists once its manifest does.
            store.write(MANIFEST, manifest_to_json(manifest))
        return manifest

    def with_profile(self, batches: Iterable[Mapping[str, Any]]) -> Artifact:
        """Add the profile of known data, which a server compares with what it is asked.

        Args:
            batches: inputs by name, rows first; the more like what will be asked, the better. The first 8,192 rows are
                read. Of a model that generates, prompts as `prompt` and how they are continued, such as
                `{"prompt": ["Hello"], "max_tokens": 40}`.

        Raises:
            CompileError: if a batch does not fit the model.

        >>> program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
        >>> artifact = lx.compile(program, {"batch": (1, 8)}).with_profile([{"x": np.eye(4, dtype=np.float32)}])
        >>> artifact.manifest.profile.rows
        4
        """
        return dataclasses.replace(
            self, manifest=msgspec.structs.replace(self.manifest, profile=profile(self.servable(), batches))
        )

    def with_certificate(self, certificate: Certificate) -> Artifact:
        """Add what was found of the model; `sign` signs it with the artifact.

        Args:
            certificate: from `tuning.Tuning.certify`.

        >>> found = dict(metric="accuracy", float_value=0.98, value=0.97, drop=0.9, low=0.1, high=1.7, rows=500)
        >>> found |= dict(all_rows=1000, data="0" * 64, weights_bytes=16, float_bytes=64, recipe="int8", promised=0.95)
        >>> program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
        >>> certificate = lx.tuning.Certificate(**found)
        >>> lx.compile(program, {"batch": (1, 8)}).with_certificate(certificate).servable().certificate.promised
        0.95
        """
        return dataclasses.replace(self, manifest=msgspec.structs.replace(self.manifest, certificate=certificate))

    def servable(self) -> Servable:
        """Make the model ready to run in this process, without files.

        Raises:
            ArtifactError: if it has weights only.
        """
        if not self.programs:
            raise ArtifactError(f"{self.manifest.name} has weights only: save it, and load it with base=")
        expander, weights, devices = None, self.weights, self.devices or Devices.of(self.manifest.mesh)
        if EXPAND in self.executables:
            expander = self.executables[EXPAND].loaded
            weights = run_expand(expander, weights, devices, self.manifest.unpacked)
        runtime = Runtime(*self.manifest.signature(), weights, devices)
        for sizes in combinations(self.manifest.buckets):
            runtime.add(sizes, self.executables[bucket_name(sizes)].loaded)
        steps = None
        if self.steps is not None:
            loaded = {name: code.loaded for name, code in self.executables.items()}
            steps = Stepper.of(self.manifest, self.manifest.buckets, loaded, runtime)
        tokenizer = self.steps.tokenizer if self.steps is not None else b""
        return Servable(
            self.manifest, self.manifest.buckets, runtime, "executables", expander, steps, tokenizer, self.conversion
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Verification:
    """Result of `verify`, if every listed file is intact.

    Attributes:
        manifest: its manifest.
        files: number of files checked, without the manifest.
        size_bytes: their total size.
        extra: files that the manifest does not list; they are never read.
        signer: file name of the trusted key that signed it; empty if no signature was asked for.
        signed_at: when, by the signer's clock, UTC, ISO 8601; empty if the signature does not say.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> manifest = lx.compile(program, {"batch": (1,)}).save("tiny.lepton")
    >>> verification = lx.verify("tiny.lepton")
    >>> verification.files == len(manifest.files), verification.extra
    (True, ())
    """

    manifest: Manifest
    files: int
    size_bytes: int
    extra: tuple[str, ...]
    signer: str = ""
    signed_at: str = ""


@takes(location=(str, os.PathLike), trust=(str, os.PathLike, TrustedKeys))
def verify(
    location: str | os.PathLike[str], *, trust: str | os.PathLike[str] | TrustedKeys | None = None
) -> Verification:
    """Check the size and digest of every file of an artifact. Executes and deserializes nothing.

    Args:
        location: a local folder, or a `gs://` or `s3://` prefix.
        trust: a public key or a folder of public keys. The artifact has to be signed by one of them, with all of its
            files. None asks for no signature.

    Raises:
        ArtifactError: if a file is missing or damaged; names the first one.
        TrustError: if it is unsigned, signed by another key, or has files that are not signed.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> manifest = lx.compile(program, {"batch": (1,)}, name="tiny").save("tiny.lepton")
    >>> lx.verify("tiny.lepton").manifest.name
    'tiny'
    """
    trusted = trusted_keys(trust)
    return consistently(location, lambda store: _verified(store, trusted))


def _verified(store: Store, trusted: TrustedKeys | None) -> Verification:
    signed = read_signature(store, trusted) if trusted is not None else None
    manifest = read_manifest(store, signed)
    files = VerifiedFiles(store, manifest.files)
    for name in manifest.files:
        files.read(name)
    extra = tuple(name for name in store.names() if name not in {*manifest.files, MANIFEST, SIGNATURE})
    if signed is not None:
        check_signed_files(store, manifest, signed, extra)
    size_bytes = manifest.size_bytes
    found = Verification(manifest, len(manifest.files), size_bytes, extra)
    if signed is None:
        return found
    signed_at = "" if signed.signed_s is None else utc(signed.signed_s)
    return dataclasses.replace(found, signer=signed.signer, signed_at=signed_at)
