"""Examines an installation: versions, devices, kernels, cache and flags, and what to do about each fault.

What may crash or hang, such as the import of JAX, happens in a process of its own (`probe`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from lepton_xla.environment.flags import slow_flags
from lepton_xla.environment.machine import CACHE_VARIABLE, cache_folder, cpu_features, cpu_model, usable_cores
from lepton_xla.environment.requirements import PACKAGE, Requirement, requirements
from lepton_xla.errors import first_line

type State = Literal["ok", "note", "fault"]

# CPU features that change which code runs, in the order in which they are shown.
_FEATURES = (
    "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
# Settings of JAX under which compiled code is slow or not used at all.
_SLOW_SETTINGS = ("JAX_DISABLE_JIT", "JAX_DEBUG_NANS", "JAX_DEBUG_INFS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
_PROBE = "from lepton_xla.environment.diagnosis import probe; probe()"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found of one thing.

    Attributes:
        name: what was examined.
        state: `ok`; `note` if it works, but something else could be better; `fault` if it does not work.
        found: what is there.
        advice: what to do; empty if nothing.
    """

    name: str
    state: State
    found: str
    advice: str = ""


def diagnose(timeout_s: float = 120.0) -> list[Finding]:
    """Examine this installation and this machine.

    Args:
        timeout_s: seconds that JAX may take to find the devices and to compute something.
    """
    probed = _probe(timeout_s)
    return [
        Finding("python", "ok", f"{platform.python_version()}, {sys.executable}"),
        *_packages(),
        *(_of_probe(name, check, probed) for name, check in _PROBED.items()),
        _cpu(),
        _cache(),
        *_environment(),
    ]


def probe() -> None:
    """Print what JAX is and does here, one JSON object a line, each as soon as it is known."""

    def tell(**facts: Any) -> None:
        print(json.dumps(facts), flush=True)  # noqa: T201 (another process reads it)

    import jax
    import jax.numpy as jnp
    import numpy as np

    tell(jax=jax.__version__)
    specs = [spec for module in list(sys.modules.values()) if (spec := getattr(module, "__spec__", None))]
    cached = [spec.cached for spec in specs if spec.cached]
    tell(modules=len(cached), byte_code=sum(map(os.path.exists, cached)))  # the import has written what it may
    try:
        import flax

        tell(flax=flax.__version__)
    except ModuleNotFoundError as error:
        tell(flax=None, flax_error="" if error.name == "flax" else str(error))
    except Exception as error:  # what an unfit JAX makes of it
        tell(flax=None, flax_error=f"{type(error).__name__}: {first_line(error)}")
    from lepton_xla.kernels import installation

    version, problem = installation.examine()
    variant = ""
    if version and not problem:
        with contextlib.suppress(AttributeError):
            variant = importlib.import_module("lepton_xla_kernels").variant()
    off = os.environ.get(installation.VARIABLE) == "off"
    tell(kernels=version, problem=problem, variant=variant, interface=installation.INTERFACE, off=off)
    tell(devices=[f"{device.platform} {device.device_kind}" for device in jax.devices()])
    left, right = np.arange(12).reshape(3, 4) - 6, np.arange(20).reshape(4, 5) - 9
    integers = jnp.asarray(left, jnp.int8), jnp.asarray(right, jnp.int8)
    product = jax.jit(lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.int32))(*integers)
    floats = jax.jit(lambda a, b: a @ b)(jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32))
    tell(computes=bool((np.asarray(product) == left @ right).all() and np.allclose(floats, left @ right, rtol=1e-2)))


def _probe(timeout_s: float) -> dict[str, Any]:
    """The facts that `probe` told in a process of its own; `failure` says why it told no more."""
    try:
        done = subprocess.run(  # noqa: S603 (this Python, and a constant)
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=timeout_s, check=False
        )
        out, failure = done.stdout, _failure(done.returncode, done.stderr)
    except subprocess.TimeoutExpired as error:
        out = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        failure = f"no answer within {timeout_s:g} s"
    facts: dict[str, Any] = {"failure": failure}
    for line in out.splitlines():
        with contextlib.suppress(ValueError):  # something else that was printed
            told = json.loads(line)
            facts |= told if isinstance(told, dict) else {}
    return facts


def _failure(code: int, text: str) -> str:
    """Why a process ended: the line that says most, or its exit code; empty if all is well."""
    if code == 0:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or line.startswith("F")] or lines
    return telling[-1][:300] if telling else f"the process ended with exit code {code}"


def _packages() -> Iterator[Finding]:
    try:
        asked = requirements()
    except importlib.metadata.PackageNotFoundError:
        advice = f"pip install {PACKAGE}, or pip install --editable . in the folder of its source"
        yield Finding(PACKAGE, "fault", "is imported from its source, but not installed", advice)
        return
    yield Finding(PACKAGE, "ok", importlib.metadata.version(PACKAGE))
    extras: dict[str, list[Requirement]] = {}
    for each in asked:
        if each.extra:
            extras.setdefault(each.extra, []).append(each)
        elif each.fits:
            yield Finding(each.name, "ok", f"{each.installed} ({each.versions or 'any version'})")
        else:
            found = f"{each.installed or 'is not installed'}; needed is {each.versions or 'any version'}"
            yield Finding(each.name, "fault", found, f"pip install '{each.name}{each.versions}'")
    extras.pop("dev", None)
    unfit = [each for group in extras.values() for each in group if each.installed is not None and not each.fits]
    for each in {each.name: each for each in unfit}.values():
        advice = f"pip install '{PACKAGE}[{each.extra}]'"
        yield Finding(each.name, "fault", f"{each.installed}; the extra {each.extra} needs {each.versions}", advice)
    whole = [name for name, group in extras.items() if all(each.fits for each in group)]
    rest = [name for name in extras if name not in whole]
    found = f"installed: {', '.join(whole) or 'none'}; not installed: {', '.join(rest) or 'none'}"
    yield Finding("extras", "ok", found, f"pip install '{PACKAGE}[NAME]' adds one" if rest else "")


def _jax(facts: Mapping[str, Any]) -> Finding:
    return Finding("jax starts", "ok", f"jax {facts['jax']} imports")


def _byte_code(facts: Mapping[str, Any]) -> Finding:
    total, missing = facts["modules"], facts["modules"] - facts["byte_code"]
    if 10 * missing <= total:
        return Finding("byte code", "ok", f"{total - missing} of {total} modules that JAX imports have theirs")
    found = f"{missing} of {total} modules that JAX imports have none, so each start compiles them"
    where = "PYTHONDONTWRITEBYTECODE is set" if sys.dont_write_bytecode else "their folder cannot be written"
    advice = f"{where}: run python -m compileall on it once, or install with uv's --compile-bytecode"
    return Finding("byte code", "note", found, advice)


def _flax(facts: Mapping[str, Any]) -> Finding:
    name = "flax and jax"
    if facts["flax"]:
        return Finding(name, "ok", f"flax {facts['flax']} works with jax {facts['jax']}")
    if facts["flax_error"]:
        advice = "flax 0.12.12 is the first for jax 0.11.2 to 0.12: pip install 'flax>=0.12.12,<0.13'"
        return Finding(name, "fault", f"flax does not import with jax {facts['jax']}: {facts['flax_error']}", advice)
    return Finding(name, "note", "flax is not installed", "for Flax models: pip install 'lepton-xla[flax]'")


def _kernels(facts: Mapping[str, Any]) -> Finding:
    version, interface = facts["kernels"], facts["interface"]
    if version is None:
        advice = "where there is a C++ compiler, make kernels (or pip install ./kernels) makes models faster"
        return Finding("kernels", "note", "lepton-xla-kernels is not installed", advice)
    found = f"lepton-xla-kernels {version}"
    if facts["problem"]:
        return Finding("kernels", "fault", f"{found} {facts['problem']}", "build them again: make kernels")
    found = f"{found}, interface {interface}, for {facts['variant'] or 'any CPU'}"
    if facts["off"]:
        return Finding("kernels", "note", f"{found}, switched off", "unset LEPTON_KERNELS to use them")
    if facts["variant"] == "portable":
        return Finding("kernels", "note", found, "this CPU lacks AVX2, for which the fast ones are written")
    return Finding("kernels", "ok", found)


def _devices(facts: Mapping[str, Any]) -> Finding:
    kinds: list[str] = facts["devices"]
    found = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    only_cpu = all(kind.startswith("cpu") for kind in kinds)
    if only_cpu and any(pathlib.Path("/dev").glob("nvidia[0-9]*")) and os.environ.get("JAX_PLATFORMS") != "cpu":
        advice = f"pip install '{PACKAGE}[cuda12]'"
        return Finding("devices", "note", f"{found}; there is an NVIDIA GPU that JAX does not use", advice)
    return Finding("devices", "ok", found)


def _computes(facts: Mapping[str, Any]) -> Finding:
    if facts["computes"]:
        return Finding("computes", "ok", "products of float32 and int8 are right")
    advice = "remove flags from XLA_FLAGS, and install jaxlib again"
    return Finding("computes", "fault", "a compiled product is wrong", advice)


# By name: the check, whose fact has the same name as it.
_PROBED: dict[str, Callable[[Mapping[str, Any]], Finding]] = {
    "jax": _jax,
    "byte_code": _byte_code,
    "flax": _flax,
    "kernels": _kernels,
    "devices": _devices,
    "computes": _computes,
}


def _of_probe(name: str, check: Callable[[Mapping[str, Any]], Finding], facts: Mapping[str, Any]) -> Finding:
    if name in facts:
        return check(facts)
    before = [each for each in list(_PROBED)[: list(_PROBED).index(name)] if each not in facts]
    if before:
        return Finding(name, "fault", f"not examined, because {before[0]} failed")
    advice = {
        "jax": "jax and jaxlib have to fit each other: pip install --upgrade 'jax>=0.11.1,<0.13'",
        "devices": "XLA ends the process at a flag in XLA_FLAGS that it does not know: check XLA_FLAGS and "
        f"JAX_PLATFORMS ({os.environ.get('XLA_FLAGS', '') or 'not set'}; "
        f"{os.environ.get('JAX_PLATFORMS', '') or 'not set'})",
    }.get(name, "install it again")
    return Finding(name, "fault", facts["failure"] or "no answer", advice)


def _cpu() -> Finding:
    known = cpu_features()
    features = " ".join(name for name in _FEATURES if name in known)
    total = os.cpu_count() or 1
    cores = f"{usable_cores()} of {total} cores" if usable_cores() < total else f"{total} cores"
    found = f"{cpu_model() or platform.machine()}, {cores}, {features or 'no vector features that matter'}"
    if platform.machine() == "x86_64" and "avx2" not in known:
        return Finding("cpu", "note", found, "without AVX2 everything is several times slower")
    return Finding("cpu", "ok", found)


def _cache() -> Finding:
    folder = cache_folder()
    if folder is None:
        advice = f"unset {CACHE_VARIABLE}, or optimize measures everything each time"
        return Finding("cache", "note", "measured times are not kept", advice)
    nearest = next((each for each in (folder, *folder.parents) if each.exists()), folder)
    if not os.access(nearest, os.W_OK) or not nearest.is_dir():
        advice = f"make it writable, or set {CACHE_VARIABLE} to another folder"
        return Finding("cache", "note", f"{folder} cannot be written", advice)
    count = sum(1 for _ in (folder / "times").glob("*.json"))
    return Finding("cache", "ok", f"{folder}, {count} measured times")


def _environment() -> Iterator[Finding]:
    flags = os.environ.get("XLA_FLAGS", "")
    slow = slow_flags(flags)
    if slow:
        yield Finding("XLA_FLAGS", "note", slow, "remove it")
    elif "--xla_cpu_max_isa" in flags:
        advice = "remove it, unless the code is to run on older CPUs"
        yield Finding("XLA_FLAGS", "note", f"{flags}: new code does not use all of this CPU", advice)
    else:
        yield Finding("XLA_FLAGS", "ok", flags or "not set")
    for name in _SLOW_SETTINGS:
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t"):
            yield Finding(name, "note", f"is {os.environ[name]}", "unset it: compiled code is slow or not used with it")
