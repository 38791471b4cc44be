"""Machines that programs are compiled for: this CPU, an attached accelerator, or chips that are only described.

A TPU is described by libtpu, a GPU by the target configuration below and JAX's CUDA plugin; neither needs the chip.
Both libraries are optional: `pip install --editable ".[tpu]"` and `".[gpu]"`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from typing import Any

from flexattn_jax.config import ConfigError
from flexattn_jax.models.flops import PEAKS


class MissingCompiler(RuntimeError):
    """The library that compiles for a target is not installed; the message says how to get it."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one JAX device of a kind can do.

    flops: bfloat16 operations a second; bandwidth: bytes of HBM a second; memory: bytes of HBM.
    clock: Hz of the cycles that the compiler estimates in; None: it estimates none.
    network: bytes a second that the interconnect takes from a chip in one direction; None: not entered here.

    TPU: https://cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x (half a chip is one device of tpu7x). The clocks are
    peak / (2 x multipliers of the matrix units): v4 and v5p have 8 units of 128 x 128 a chip, v5e has 4, v6e has 4 of
    256 x 256. The interconnect: half of the bidirectional bandwidth a chip that those pages give (400, 1200, 800 and
    1200 GB/s for v5e, v5p, v6e and tpu7x); v4: six links of 50 GB/s (arXiv 2304.01433). GPU: NVIDIA's data sheets of
    A100 and H100 SXM, 80 GB.
    """

    flops: float
    bandwidth: float
    memory: float
    clock: float | None = None
    network: float | None = None


def _clock(peak: float, units: int, side: int) -> float:
    return peak / (2 * units * side**2)


TPUS = {
    "v4": Chip(PEAKS["TPU v4"], 1228e9, 32 * 2**30, _clock(PEAKS["TPU v4"], 8, 128), 300e9),
    "v5e": Chip(PEAKS["TPU v5e"], 819e9, 16 * 2**30, _clock(PEAKS["TPU v5e"], 4, 128), 400e9 / 2),
    "v5p": Chip(PEAKS["TPU v5"], 2765e9, 95 * 2**30, _clock(PEAKS["TPU v5"], 8, 128), 1200e9 / 2),
    "v6e": Chip(PEAKS["TPU v6e"], 1640e9, 32 * 2**30, _clock(PEAKS["TPU v6e"], 4, 256), 800e9 / 2),
    "tpu7x": Chip(2307e12 / 2, 7380e9 / 2, 96 * 2**30, network=1200e9 / 4),
}
GPUS = {
    "a100": Chip(PEAKS["NVIDIA A100"], 2039e9, 80 * 2**30),
    "h100": Chip(PEAKS["NVIDIA H100"], 3352e9, 80 * 2**30),
}

# XLA's description of a GPU (its GpuTargetConfigProto): the published properties of the SXM cards.
_GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_block: 49152
  {properties}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
_GPU_PROPERTIES = {
    "a100": (
        "NVIDIA A100-SXM4-80GB",
        "cuda_compute_capability { major: 8 minor: 0 } core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41 "
        "memory_bandwidth: 2039040000000 l2_cache_size: 41943040 device_memory_size: 85100068864 "
        "shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912",
    ),
    "h100": (
        "NVIDIA H100 80GB HBM3",
        "cuda_compute_capability { major: 9 minor: 0 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 "
        "memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072 "
        "shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448",
    ),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A parsed name such as "cpu", "attached", "v5e:2x2", "h100:4".

    platform: "cpu", "tpu", "cuda" or "attached".
    kind: key of TPUS or GPUS; "" for what is attached.
    shape: chips along each axis of the topology.
    """

    name: str
    platform: str
    kind: str = ""
    shape: tuple[int, ...] = (1,)

    @property
    def chip(self) -> Chip | None:
        """What is known of the chip; None for what is attached."""
        return TPUS.get(self.kind) or GPUS.get(self.kind)

    @property
    def devices(self) -> int:
        """How many JAX devices it is."""
        return math.prod(self.shape) * (2 if self.kind == "tpu7x" else 1)

    @property
    def runs_here(self) -> bool:
        """Whether a compiled program can be run, too."""
        return self.platform in ("cpu", "attached")


def parse_target(name: str) -> Target:
    """The target of that name; ConfigError says which names there are."""
    kind, _, rest = name.partition(":")
    if name in ("cpu", "attached"):
        return Target(name, name)
    if kind in GPUS and re.fullmatch(r"\d{0,9}", rest) and rest != "0":
        return Target(name, "cuda", kind, (int(rest or 1),))
    axes = 3 if kind in ("v4", "v5p", "tpu7x") else 2
    if kind in TPUS and re.fullmatch(r"[1-9]\d{0,8}" + r"x[1-9]\d{0,8}" * (axes - 1), rest):
        return Target(name, "tpu", kind, tuple(map(int, rest.split("x"))))
    raise ConfigError(
        f"targets has {name!r}; write cpu, attached, a TPU with its topology such as v5e:2x2, v6e:4x4, v4:2x2x1, "
        "v5p:2x2x1 or tpu7x:2x2x1, or a GPU with their number such as h100 or a100:8"
    )


def environment(target: Target) -> dict[str, str]:
    """Environment variables that a process needs before it imports JAX to compile for the target."""
    if target.platform == "attached":
        return {}
    variables = {"JAX_PLATFORMS": "cpu"}
    if target.platform == "tpu":  # no metadata server is asked, and several processes may use the library
        variables |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled"}
    return variables


def check_installed(target: Target) -> None:
    """Raises MissingCompiler where the target's compiler is not installed."""
    if target.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise MissingCompiler(
            f"{target.name} needs TPU's compiler, libtpu, which is not installed; no TPU is needed: "
            'pip install --editable ".[tpu]"'
        )
    if target.platform == "cuda" and not _has_cuda():
        raise MissingCompiler(
            f"{target.name} needs JAX's CUDA plugin, which is not installed; no GPU is needed: "
            'pip install --editable ".[gpu]"'
        )


def open_devices(target: Target) -> list[Any]:
    """The target's JAX devices, attached or described; `environment` must have been set before JAX was imported.

    Raises:
      MissingCompiler: see `check_installed`.
      ConfigError: the compiler knows no such topology.
    """
    import jax
    from jax.experimental import topologies

    check_installed(target)
    if target.platform == "cpu":
        return jax.devices("cpu")[:1]
    if target.platform == "attached":
        return jax.devices()
    if target.platform == "cuda":
        name, properties = _GPU_PROPERTIES[target.kind]
        config = _GPU_CONFIG.format(name=name, properties=properties)
        count = math.prod(target.shape)
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=f"1x1x{count}", target_config=config
        ).devices
    options: dict[str, Any] = {"chip_config_name": "megacore"} if target.kind in ("v4", "v5p") else {}
    if math.prod(target.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=target.name, **options).devices
    except Exception as error:
        raise ConfigError(
            f"the installed libtpu knows no topology {target.name!r} ({str(error).splitlines()[0]}); see "
            "https://cloud.google.com/tpu/docs for those that exist"
        ) from error


def _has_cuda() -> bool:
    try:
        return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13))
    except ModuleNotFoundError:
        return False
