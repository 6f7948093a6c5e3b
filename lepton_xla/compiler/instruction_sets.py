"""Code for other x86 CPUs than this one: compiled under a cap on instructions, and what it then needs of a CPU.

XLA takes the cap from `XLA_FLAGS` when its client is made, so such code is compiled in a process of its own.
"""

from __future__ import annotations

import re

from lepton_xla.environment.machine import relevant_xla_flags

FLAG = "--xla_cpu_max_isa"
# XLA's names of the caps, the widest last.
CAPS = ("AVX2", "AVX512")

# Names of LLVM that Linux writes otherwise.
_LINUX: dict[str, str] = {
    "64bit": "lm", "sse3": "pni", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "avxvnni": "avx_vnni", "bmi": "bmi1",
    "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16", "avx512fp16": "avx512_fp16",
    "avx512bitalg": "avx512_bitalg", "avx512vbmi2": "avx512_vbmi2", "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512vp2intersect": "avx512_vp2intersect", "avxifma": "avx_ifma", "avxvnniint8": "avx_vnni_int8",
    "avxneconvert": "avx_ne_convert", "lzcnt": "abm", "pclmul": "pclmulqdq", "amx-tile": "amx_tile",
    "amx-int8": "amx_int8", "amx-bf16": "amx_bf16", "amx-fp16": "amx_fp16",
}  # fmt: skip
# Instructions that compilers emit only where a program asks for them by name, which XLA's programs do not.
_NEVER_USED = frozenset({
    "adx", "aes", "clflushopt", "clwb", "clzero", "cmov", "crc32", "cx16", "cx8", "fsgsbase", "fxsr", "invpcid",
    "mmx", "pclmul", "prfchw", "rdpid", "rdpru", "rdrnd", "rdseed", "sahf", "sha", "sha512", "shstk", "vaes",
    "vpclmulqdq", "xsave", "xsavec", "xsaveopt", "xsaves", "pku", "waitpkg", "serialize", "movdiri", "movdir64b",
    "wbnoinvd", "mwaitx", "ptwrite", "cldemote", "enqcmd", "uintr", "hreset", "sm3", "sm4", "kl", "widekl",
})  # fmt: skip
_FEATURES = re.compile(rb"[+-][a-z0-9.-]+(?:,[+-][a-z0-9.-]+){20,}")


def cap_in(flags: str) -> str:
    """The cap that `XLA_FLAGS` sets; empty if there is none.

    >>> cap_in("--xla_cpu_max_isa=AVX2"), cap_in("")
    ('AVX2', '')
    """
    given = [flag.partition("=")[2].upper() for flag in flags.split() if flag.partition("=")[0] == FLAG]
    return given[-1] if given else ""


def without_cap(flags: str) -> str:
    """The flags that can change compiled code, without the cap."""
    return relevant_xla_flags(" ".join(flag for flag in flags.split() if flag.partition("=")[0] != FLAG))


def needed_features(blob: bytes) -> frozenset[str] | None:
    """The features, by Linux' names, that compiled code may use; None if the code does not tell.

    >>> listed = ",".join(["+64bit", "+avx2", "+sse4.1", "+sha", "+prefer-no-gather"] + ["-amx-tile"] * 20)
    >>> sorted(needed_features(listed.encode()))
    ['avx2', 'lm', 'sse4_1']
    """
    found = _FEATURES.findall(blob)
    if not found:
        return None
    names = {feature[1:] for text in found for feature in text.decode().split(",") if feature[0] == "+"}
    # Preferences say what is fast.
    wanted = {name for name in names if not name.startswith(("prefer-", "fast-", "slow-", "tuning"))}
    kept: set[str] = wanted - _NEVER_USED
    return frozenset(_LINUX.get(name, name) for name in kept)
