"""Devices that this machine does not have, named as `v5e:4x4` or `h100:8`: their compiler needs no device."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from lepton_xla.environment.machine import DeviceFigures, figures_of
from lepton_xla.errors import CompileError, ShardingError, first_line

# Kind of device, of those TPUs whose memory is known.
_TPUS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}


@dataclasses.dataclass(frozen=True)
class _GPU:
    """What NVIDIA's compiler needs to know of a GPU."""

    name: str
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    memory_bytes: int
    bandwidth: int
    l2_bytes: int

    @property
    def description(self) -> str:
        """The GPU as XLA's `GpuTargetConfigProto`, in text. Limits are those of compute capabilities 9.0 and 10.0."""
        major, minor = self.capability
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
            gpu_device_info {{
              name: "{self.name}"
              device_vendor: "NVIDIA Corporation"
              cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: ACCELERATED_FEATURES }}
              core_count: {self.cores}
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory_bytes}
              memory_bandwidth: {self.bandwidth}
              l2_cache_size: {self.l2_bytes}
              fpus_per_core: 128
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: 2048
              thread_dim_limit_x: 1024
              thread_dim_limit_y: 1024
              thread_dim_limit_z: 64
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: 232448
              shared_memory_per_core: 233472
              device_address_bits: 64
              pcie_bandwidth: 64000000000
              driver_version: "12.9.0"
              runtime_version: "12.9.0"
              compile_time_toolkit_version: "12.9.0"
              dnn_version: "9.10.2"
            }}
        """


_GPUS = {
    "h100": _GPU("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 84_942_979_072, 3_352_320_000_000, 52_428_800),
    "h200": _GPU("NVIDIA H200", (9, 0), 132, 1.98, 151_397_597_184, 4_800_000_000_000, 52_428_800),
    "b200": _GPU("NVIDIA B200", (10, 0), 148, 1.965, 191_514_411_008, 7_672_320_000_000, 132_644_864),
}
_FORMS = "v5e:4x4, v5p:2x2x1 or v6e:8x8 for TPUs; h100:8, or h100:2x8 for two machines, h200 and b200 for GPUs"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
        name: such as `v5e:4x4`.
        kind: kind of device, such as `TPU v5 lite`.
        devices: the devices; nothing can run on them.
        is_exact: whether the platform's own compiler compiles for them. Otherwise they are this machine's CPU devices,
            so sizes of buffers and collective operations are those of XLA's CPU compiler.
        figures: speed and memory of a device; None if not known. Between GPUs of several machines the speed of the
            network is not known, so `link_bandwidth` is None.
    """

    name: str
    kind: str
    devices: tuple[Any, ...]
    is_exact: bool
    figures: DeviceFigures | None


def topology_devices(name: str) -> list[Any]:
    """The devices of a topology, to compile for with their own compiler; they need not exist.

    Args:
        name: TPUs such as `v5e:4x4`; `h100:8` for GPUs of one machine, `h100:2x8` for two machines.

    Raises:
        CompileError: if there is no such topology, or its compiler is not installed.

    >>> topology_devices("no such thing")
    Traceback (most recent call last):
    lepton_xla.errors.CompileError: topology 'no such thing': ...
    """
    family, _, count = name.partition(":")
    if family in _GPUS:
        hosts, local = _gpu_counts(name, count)
        # Slices, machines of a slice, GPUs of a machine.
        options = {"target_config": _GPUS[family].description, "topology": f"1x{hosts}x{local}"}
        return _described(name, "cuda", "pip install 'jax[cuda12]'", "", **options)
    return _described(name, "tpu", "pip install 'jax[tpu]'", name)


def find_topology(name: str) -> Topology:
    """Find a topology. If its compiler is not installed, CPU devices of this process stand for its devices.

    Raises:
        CompileError: if there is no such topology.
        ShardingError: if this process has too few CPU devices.

    >>> find_topology("v5e:1x1").kind
    'TPU v5 lite'
    """
    family = name.partition(":")[0]
    if has_compiler(name) or not (family in _TPUS or family in _GPUS):
        devices = tuple(topology_devices(name))
        return Topology(name, devices[0].device_kind, devices, True, _figures(name, devices[0].device_kind))
    kind = _TPUS.get(family) or _GPUS[family].name
    return Topology(name, kind, cpu_devices(device_count(name)), False, _figures(name, kind))


def device_count(name: str) -> int:
    """Number of devices of a topology whose name says it: of TPUs v5 and v6, and of GPUs.

    Raises:
        CompileError: if the name has another form.

    >>> device_count("v5e:4x4"), device_count("h100:2x8")
    (16, 16)
    """
    family, _, count = name.partition(":")
    if family in _GPUS:
        return math.prod(_gpu_counts(name, count))
    if family not in _TPUS or not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}", count):
        raise CompileError(f"topology {name!r}: expected {_FORMS}")
    return math.prod(map(int, count.split("x")))


def has_compiler(name: str) -> bool:
    """Whether the compiler of a topology's devices is installed.

    >>> has_compiler("no such thing")
    False
    """
    family = name.partition(":")[0]
    if family in _GPUS:
        return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    return family in _TPUS and importlib.util.find_spec("libtpu") is not None


def cpu_devices(count: int) -> tuple[Any, ...]:
    """CPU devices of this process that stand for others.

    Raises:
        ShardingError: if there are too few.

    >>> len(cpu_devices(1))
    1
    """
    found = jax.local_devices(backend="cpu")
    if len(found) < count:
        raise ShardingError(
            f"{count} CPU devices are needed to stand for the topology's, but this process has {len(found)}: set "
            f"JAX_NUM_CPU_DEVICES={count}"
        )
    return tuple(found[:count])


def provide_stand_ins(name: str) -> None:
    """Make CPU devices for a topology whose compiler is not installed, if JAX has not started in this process yet.

    Raises:
        CompileError: if there is no such topology.

    >>> provide_stand_ins("v5e")
    Traceback (most recent call last):
    lepton_xla.errors.CompileError: topology 'v5e': expected v5e:4x4, ...
    """
    if has_compiler(name):
        return
    count = device_count(name)
    with contextlib.suppress(RuntimeError):  # JAX has started; `cpu_devices` tells how many there are
        jax.config.update("jax_num_cpu_devices", count)


def _figures(name: str, kind: str) -> DeviceFigures | None:
    family, _, count = name.partition(":")
    found = figures_of(kind)
    if found is not None and family in _GPUS and _gpu_counts(name, count)[0] > 1:
        return dataclasses.replace(found, link_bandwidth=None)
    return found


def _gpu_counts(name: str, count: str) -> tuple[int, int]:
    """Machines, and GPUs of a machine."""
    found = re.fullmatch(r"(?:([1-9]\d{0,3})x)?([1-9]\d{0,3})", count)
    if not found:
        raise CompileError(f"topology {name!r}: expected {_FORMS}")
    return int(found.group(1) or 1), int(found.group(2))


def _described(name: str, platform: str, install: str, topology_name: str, **options: Any) -> list[Any]:
    # Without a TPU, libtpu would look for one in the metadata of a cloud machine.
    known = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}
    absent = {key: value for key, value in known.items() if key not in os.environ}
    os.environ.update(absent)
    try:
        return list(topologies.get_topology_desc(topology_name, platform=platform, **options).devices)
    except Exception as error:  # the type differs: RuntimeError, ValueError, XLA's own
        raise CompileError(
            f"topology {name!r}: {first_line(error)} (topologies are {_FORMS}; they take the platform's compiler: "
            f"{install})"
        ) from error
    finally:
        for key in absent:
            del os.environ[key]
