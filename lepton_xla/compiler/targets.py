"""Adds code for other machines to an artifact, where their compiler is here."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence

import msgspec

from lepton_xla.arguments import takes
from lepton_xla.compiler.instruction_sets import FLAG, without_cap
from lepton_xla.compiler.opening import is_signed, read_manifest
from lepton_xla.compiler.storage import Store
from lepton_xla.environment.machine import cpu_features
from lepton_xla.errors import CompileError

# Targets with a compiler in this process's jaxlib: XLA's cap, and the feature that this machine must have.
_CAPPED = {"cpu-avx2": ("AVX2", "avx2"), "cpu-avx512": ("AVX512", "avx512f")}
# Targets that take the portable program, and why: the platform that it must be for.
_PORTABLE = {
    "aarch64": ("cpu", "jaxlib for x86 has no compiler for ARM"),
    "cuda": ("cuda", "code is for one kind of GPU: `--topology h100:1` adds it, with jax[cuda12]"),
    "tpu": ("tpu", "code is for one kind of TPU: `--topology v5e:1x1` adds it, with jax[tpu]"),
}
TARGETS = (*_CAPPED, *_PORTABLE)
_TIMEOUT_S = 3600
_CHILD = "import sys, lepton_xla as lx; lx.load(sys.argv[1], write_back=True)"


class Target(msgspec.Struct, frozen=True):
    """What an artifact has for a target.

    Attributes:
        name: the target.
        route: `executables`, or `stablehlo` if loading compiles the portable program there.
        reason: why not executables; empty for those.

    >>> from lepton_xla.compiler import Target
    >>> Target("aarch64", "stablehlo", "there is no compiler for it here").route
    'stablehlo'
    """

    name: str
    route: str
    reason: str = ""


def check_targets(names: Sequence[str]) -> tuple[str, ...]:
    """Check the names of targets, before anything is done.

    Raises:
        CompileError: if there is no such target, or this machine cannot make its code.

    >>> check_targets(["aarch64", "aarch64"])
    ('aarch64',)
    >>> check_targets(["riscv"])
    Traceback (most recent call last):
    lepton_xla.errors.CompileError: there is no target 'riscv': expected cpu-avx2, cpu-avx512, aarch64, cuda, tpu
    """
    for name in names:
        if name not in TARGETS:
            raise CompileError(f"there is no target {name!r}: expected {', '.join(TARGETS)}")
        if name in _CAPPED and _CAPPED[name][1] not in cpu_features():
            raise CompileError(
                f"target {name!r}: this machine ({platform.machine()}) lacks {_CAPPED[name][1]}, so it cannot make "
                "such code: compile it on one that has it"
            )
    return tuple(dict.fromkeys(names))


@takes(location=(str, os.PathLike), names=Sequence)
def add_targets(location: str | os.PathLike[str], names: Sequence[str]) -> list[Target]:
    """Add code for other machines to a saved artifact.

    Code for `cpu-avx2` and `cpu-avx512` runs on any CPU that has the features that it was compiled with: those of this
    one, without the vector instructions above AVX2 or AVX-512. Loading takes code for just its machine first, and then
    the widest. It never calls kernels of `lepton-xla-kernels`.

    Args:
        location: the artifact, a local folder that is not signed yet.
        names: of `TARGETS`.

    Raises:
        CompileError: if there is no such target, this machine cannot make its code, the compiler fails, or the
            artifact's portable program is not for it.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> _ = lx.compile(program, {"batch": (1,)}).save("tiny.lepton")
    >>> [(target.name, target.route) for target in add_targets("tiny.lepton", ["aarch64", "tpu"])]
    [('aarch64', 'stablehlo'), ('tpu', 'stablehlo')]
    """
    chosen = check_targets(names)
    store = Store(location)
    manifest = read_manifest(store)
    if is_signed(store):
        raise CompileError(
            f"{store.location}: it is signed, and new files would void the signature; sign it afterwards"
        )
    platforms = {name for program in manifest.programs for name in program.platforms}
    found: list[Target] = []
    for name in chosen:
        if name in _CAPPED:
            _compile_capped(store.location, *_CAPPED[name])
            found.append(Target(name, "executables"))
            continue
        needed, reason = _PORTABLE[name]
        if needed not in platforms or (needed != "cpu" and any(program.sizes for program in manifest.programs)):
            raise CompileError(
                f"target {name!r}: the portable program of {store.location} is only for {', '.join(sorted(platforms))}"
                + (f" ({manifest.programs_note})" if manifest.programs_note else "")
            )
        found.append(Target(name, "stablehlo", reason))
    return found


def _compile_capped(location: str, cap: str, feature: str) -> None:
    """Compile the portable programs in a process under a cap, which writes the code into the artifact."""
    flags = f"{without_cap(os.environ.get('XLA_FLAGS', ''))} {FLAG}={cap}".strip()
    environ = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "LEPTON_KERNELS": "off"}
    environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", _CHILD, location]
    try:
        done = subprocess.run(  # noqa: S603 (this Python, and a constant)
            command, env=environ, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CompileError(f"{location}: compiling for {cap} took more than {_TIMEOUT_S} s") from error
    sets = read_manifest(Store(location)).executables.values()
    if done.returncode != 0 or not any(entry.target.cap == cap and entry.files for entry in sets):
        lines = done.stderr.strip().splitlines()
        raise CompileError(f"{location}: cannot be compiled for {cap} ({feature}): {lines[-1] if lines else 'no code'}")
