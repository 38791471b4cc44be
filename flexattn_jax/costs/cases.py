"""What can be measured: the axes of the table, and the product of those that a user chose.

A way to read pictures is one entry of SYSTEMS.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

from flexattn_jax.config import ConfigError, VLMConfig, from_dict, override, preset
from flexattn_jax.costs.rankings import RANKINGS
from flexattn_jax.costs.targets import parse_target

CHECKS = ("matmul", "attention")  # programs without a model, to check the estimates by
PROGRAMS = ("prefill", "decode", "score", "train", *CHECKS)
LAYERS = ("scanned", "unrolled")
REMAT = ("none", "full", "dots")


@dataclasses.dataclass(frozen=True)
class Case:
    """One program for one target.

    system: name, with the cells that a row keeps after a colon, as `system_overrides` takes it.
    depth: decoder layers; FlexAttention begins after the same share of them as in the preset. None: the preset's.
    zoom: side of the picture over that of the low-resolution one. None: the preset's.
    batch: samples of an inference program; of training, samples a device.
    text: positions beside the picture's slots.
    options: compiler options, as "--name=value --name=value".
    """

    system: str
    program: str
    target: str
    preset: str = "7b"
    layers: str = "scanned"
    remat: str = "none"
    depth: int | None = None
    ranking: str = "cells"
    zoom: int | None = None
    batch: int = 1
    text: int = 64
    dtype: str = "bfloat16"
    options: str = ""

    @property
    def name(self) -> str:
        """Tells the case from every other, for people and as a key."""
        model = [self.preset, self.system] if self.program not in CHECKS else []
        parts = [*model, self.program, self.layers, self.target]
        parts += [f"remat {self.remat}"] if self.remat != "none" else []
        parts += [f"{self.depth} layers"] if self.depth else []
        parts += [f"by {self.ranking}"] if self.ranking != "cells" else []
        parts += [f"zoom {self.zoom}"] if self.zoom else []
        parts += [f"batch {self.batch}", f"text {self.text}"] if model else []
        parts += [self.dtype]
        return ", ".join(parts + ([self.options] if self.options else []))


@dataclasses.dataclass(frozen=True)
class System:
    """One way to read a picture.

    overrides: of a preset, given it and the number that the system's name has after its colon.
    counts: what that number counts: "cells" or "tokens"; "": the name has none.
    """

    overrides: Callable[[VLMConfig, int], dict[str, Any]]
    counts: str = ""


def _flex(config: VLMConfig, cells: int) -> dict[str, Any]:
    if cells >= config.flexattention.num_cells:
        return {"flexattention.selector": "all"}
    return {
        "flexattention.selection": "top_k",
        "flexattention.capacity": cells,
        "flexattention.union_capacity": cells,
    }


def _without_highres(config: VLMConfig, **more: Any) -> dict[str, Any]:
    return {"flexattention": None, "image_size": config.lowres_size} | more


def _tiled(config: VLMConfig, name: str, **more: Any) -> dict[str, Any]:
    """Another reader of the picture that FlexAttention would read, cut into as many tiles."""
    changes = {f"{name}.{key}": value for key, value in more.items()}
    return {"flexattention": None, f"{name}.tiles": config.flexattention.zoom_ratio} | changes


def _reduced(method: str) -> System:
    return System(lambda c, n: _without_highres(c, **{"reduction.method": method, "reduction.tokens": n}), "tokens")


SYSTEMS: dict[str, System] = {
    "lowres": System(lambda c, _: _without_highres(c)),  # LLaVA-1.5
    "flex": System(_flex, "cells"),
    "dense": System(lambda c, _: _tiled(c, "dense") | {"decoder.max_positions": 16384}),  # LLaVA-1.5-HD
    "cogagent": System(lambda c, _: _tiled(c, "crossattention")),
    "xattn": System(
        lambda c, _: _tiled(
            c, "crossattention", width=c.decoder.width, num_heads=c.decoder.num_heads, source="connector"
        )
    ),
    "vistog": System(lambda c, n: _without_highres(c, **{"grouping.groups": n}), "tokens"),
    **{method: _reduced(method) for method in ("fastv", "pyramiddrop", "visionzip", "tome", "random", "downsample")},
}


def system_overrides(config: VLMConfig, system: str) -> dict[str, Any]:
    """What to override in a preset for a system such as "lowres", "flex:10%", "flex:all" or "fastv:192".

    Raises:
      ConfigError: no such system, or not so many cells.
    """
    found, number = _find(system, "systems")
    most = config.flexattention.num_cells if found.counts == "cells" else config.num_lowres_tokens
    return found.overrides(config, _number(number, most, system, found.counts) if number else 0)


def _find(system: str, setting: str) -> tuple[System, str]:
    """A system and what stands behind its colon; ConfigError, which names the setting, where there is none such."""
    name, _, number = system.partition(":")
    found = SYSTEMS.get(name)
    if found is None or bool(found.counts) != bool(number):
        bare = ", ".join(name for name, one in SYSTEMS.items() if not one.counts)
        counted = ", ".join(name for name, one in SYSTEMS.items() if one.counts == "tokens")
        raise ConfigError(
            f"{setting} has {system!r}; write {bare}; flex with cells that a row keeps: flex:8, flex:10%, flex:all; "
            f"or one of {counted} with the tokens that are left: fastv:192"
        )
    return found, number


def _number(text: str, most: int, system: str, what: str) -> int:
    """A number of cells or tokens given as "8", "10%" or "all"."""
    if text == "all":
        return most
    if match := re.fullmatch(r"(\d{1,9})(%?)", text):
        count = max(1, round(int(match[1]) * most / 100)) if match[2] else int(match[1])
        if 1 <= count <= most:
            return count
    raise ConfigError(f"systems has {system!r}; {what} are a number from 1 to {most}, a share such as 10%, or all")


def model_config(case: Case) -> VLMConfig:
    """The model of a case; ConfigError where its settings do not go together."""
    config = preset(case.preset)
    changes: dict[str, Any] = {
        "dtype": case.dtype,
        "scan_layers": case.layers == "scanned",
        "remat": case.remat,
    }
    if case.zoom:
        changes |= {"flexattention.zoom_ratio": case.zoom, "image_size": config.lowres_size * case.zoom}
    if case.depth:
        first = max(1, round(config.flexattention.first_layer * case.depth / config.decoder.num_layers))
        changes |= {"decoder.num_layers": case.depth, "flexattention.first_layer": first}
    config = override(config, changes)
    changes = system_overrides(config, case.system)
    if case.ranking == "mask":
        changes |= {"flexattention.selection": "threshold", "flexattention.capacity": None}
    return override(config, changes)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What configs/compile_costs.py holds, by name; a list is written with commas, "" is the preset's own."""

    presets: str
    systems: str
    programs: str
    targets: str
    layers: str
    unrolled_systems: str
    remat: str
    depths: str
    rankings: str
    zooms: str
    options: str
    batch: int
    text: int
    train_text: int
    dtype: str
    passes: int
    time_limit: float
    unrolled_time_limit: float
    warm_cache: bool
    steps: int

    def __post_init__(self):
        for name, lowest in (("batch", 1), ("text", 2), ("train_text", 2), ("passes", 1), ("steps", 0)):
            if getattr(self, name) < lowest:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {lowest}")
        for name in ("time_limit", "unrolled_time_limit"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it is a number of seconds above 0")

    def limit(self, case: Case) -> float:
        """Seconds that one reading of a case may take."""
        return self.unrolled_time_limit if case.layers == "unrolled" else self.time_limit


def read_settings(values: Mapping[str, Any]) -> Settings:
    """The settings of a config file; ConfigError for one that is unknown, missing or of another type."""
    return from_dict(values, Settings)


def expand(settings: Settings) -> list[Case]:
    """The cases of a table, targets and programs outermost; combinations that say nothing new are left out.

    Raises:
      ConfigError: an entry that is not known, or settings that describe no model.
    """
    axes = {
        "target": _entries(settings.targets, "targets"),
        "preset": _entries(settings.presets, "presets"),
        "program": _entries(settings.programs, "programs", PROGRAMS),
        "layers": _entries(settings.layers, "layers", LAYERS),
        "depth": [None if d == "" else _whole(d, "depths") for d in settings.depths.split(",")],
        "zoom": [None if z == "" else _whole(z, "zooms") for z in settings.zooms.split(",")],
        "remat": _entries(settings.remat, "remat", REMAT),
        "ranking": _entries(settings.rankings, "rankings", tuple(RANKINGS)),
        "options": [flags.strip() for flags in settings.options.split(";")],
        "system": _entries(settings.systems, "systems"),
    }
    for target in axes["target"]:
        parse_target(target)
    unrolled = [name.strip() for name in settings.unrolled_systems.split(",") if name.strip()]
    for name in unrolled:
        _find(name, "unrolled_systems")
    cases = []
    for values in itertools.product(*axes.values()):
        case = _normal(
            Case(**dict(zip(axes, values, strict=True)), batch=settings.batch, dtype=settings.dtype), settings
        )
        if case.layers == "unrolled" and unrolled and case.system not in unrolled:
            continue
        cases.append(case)
    cases = list(dict.fromkeys(cases))
    for case in cases:
        if case.program not in CHECKS:
            model_config(case)
        compiler_options(case)
    return cases


def _normal(case: Case, settings: Settings) -> Case:
    """The case without the axes that its program or system knows nothing of."""
    if case.program in CHECKS:
        return Case("none", case.program, case.target, preset="none", batch=1, text=0, options=case.options)
    if case.program == "train":
        case = dataclasses.replace(case, text=settings.train_text)
    else:
        case = dataclasses.replace(case, text=settings.text, remat="none")
    name, _, number = case.system.partition(":")
    if name != "flex" or number == "all":
        case = dataclasses.replace(case, ranking="cells")
    if name == "lowres" or (name in SYSTEMS and SYSTEMS[name].counts == "tokens"):
        case = dataclasses.replace(case, zoom=None)
    return case


def compiler_options(case: Case) -> dict[str, str]:
    """`case.options` as a dictionary, above what its target needs; ConfigError if it is not written as flags are.

    Without the card XLA cannot try its own matrix kernels (Triton's), and takes tiles that do not fit some programs:
    products are left to cuBLAS there.
    """
    found = {"xla_gpu_enable_triton_gemm": "False"} if parse_target(case.target).platform == "cuda" else {}
    for flag in case.options.split():
        match = re.fullmatch(r"--(\w+)=(.+)", flag)
        if match is None:
            raise ConfigError(f"options has {flag!r}; write compiler options as --xla_name=value, sets of them with ;")
        found[match[1]] = match[2].capitalize() if match[2] in ("true", "false") else match[2]  # as XLA spells them
    return found


def _entries(text: str, name: str, allowed: tuple[str, ...] | None = None) -> list[str]:
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not entries:
        raise ConfigError(f"{name} is empty; name at least one{', such as ' + allowed[0] if allowed else ''}")
    for entry in entries:
        if allowed is not None and entry not in allowed:
            raise ConfigError(f"{name} has {entry!r}; known: {', '.join(allowed)}")
    return entries


def _whole(text: str, name: str) -> int:
    if not re.fullmatch(r"\s*[1-9]\d{0,8}\s*", text):
        raise ConfigError(f"{name} has {text!r}; write whole numbers above 0 with commas between them")
    return int(text)
