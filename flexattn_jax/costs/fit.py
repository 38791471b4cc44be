"""Does a training run fit a machine, and how long would a step take? Asked of the compiler, before renting anything.

python -m flexattn_jax.costs.fit --config=configs/train_llava.py --topology=v5e:16x16
python -m flexattn_jax.costs.fit --config=configs/train_llava.py --topology=v5p:4x4x8 --preset=13b --systems=model,dense

The model is a preset with the config's `model` settings, for which no checkpoint is needed; T and R are the largest of
`data`. Each program is compiled in a process of its own, as compile_costs.py does it. Nothing here is measured.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from flexattn_jax.command_line import run_command
from flexattn_jax.config import ConfigError, dotted, from_dict, override, preset, to_dict
from flexattn_jax.costs.cases import Case, system_overrides
from flexattn_jax.costs.lab import run_measurement
from flexattn_jax.costs.measure import NO_ROOM, OK
from flexattn_jax.costs.programs import Fit
from flexattn_jax.costs.table import size
from flexattn_jax.costs.targets import MissingCompiler, Target, check_installed, parse_target
from flexattn_jax.files import write_whole
from flexattn_jax.partitioning import AXES, Partition, PartitionConfig, parse_rules
from flexattn_jax.training.optimizer import OptimizerConfig

_CONFIG = Path(__file__).parents[2] / "configs" / "train_llava.py"
AS_CONFIGURED = "model"  # of --systems: what the config says, changed in nothing


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the compiler says of one system.

    status: of costs/measure.py; message: where it is not OK.
    samples: B of the program that was compiled.
    memory: bytes a device: "arguments", "outputs", "temporary", "peak"; "state" and "batch" are parts of the arguments.
    collectives: kind -> {"count", "bytes"} a device and step.
    selecting_collectives: instructions among them that choose or gather cells; None: nothing is selected.
    seconds: the compiler's estimate of a step without collectives; None where it makes none.
    network_seconds: `moved_bytes` at the interconnect's speed.
    flops: operations of a step on all devices together, counted from shapes.
    largest: the largest batch that was compiled and fits; None: not asked for.
    """

    system: str
    status: str
    message: str
    samples: int
    memory: dict[str, float]
    collectives: dict[str, dict[str, float]]
    selecting_collectives: int | None
    seconds: float | None
    network_seconds: float | None
    flops: float | None
    largest: int | None


def fit_of(settings: Mapping[str, Any], preset_name: str, system: str, devices: int) -> Fit:
    """The program of a training config.

    Args:
      settings: those of configs/train_llava.py, as plain types.
      system: one of `cases.SYSTEMS`, or AS_CONFIGURED.

    Raises:
      ConfigError: settings that describe no model or do not fit the number of devices.
    """
    config = override(preset(preset_name), {"dtype": settings["start"]["dtype"] or "bfloat16", "scan_layers": True})
    config = override(config, {"remat": settings["model"].get("remat") or "none"})
    if system != AS_CONFIGURED:
        config = override(config, system_overrides(config, system))
    changes = dotted(settings["model"])
    if config.flexattention is None:
        changes = {name: value for name, value in changes.items() if not name.startswith("flexattention.")}
    config = override(config, changes)
    partition = dict(settings["partition"]) | {"rules": tuple(settings["partition"]["rules"])}
    samples, accumulation = settings["batch_size"], settings["accumulation"]
    split = from_dict(partition, PartitionConfig, "partition.").suited(devices, samples // accumulation)
    mesh = jax.sharding.AbstractMesh(split.shape(devices), AXES)
    Partition(mesh, parse_rules(split.rules)).check_batch(samples // accumulation)
    from_dict(dict(settings["optimizer"]), OptimizerConfig, "optimizer.")
    text = max(settings["data"]["text_lengths"])
    return Fit(
        config=to_dict(config),
        optimizer=dict(settings["optimizer"]),
        partition=dataclasses.asdict(split),
        samples=samples,
        accumulation=accumulation,
        text=text,
        readers=max(settings["data"]["answer_rows"]),
    )


def ask(fit: Fit, system: str, target: Target, limit: float, search: bool) -> Answer:
    """Compiles a step, and where `search` more of them until the largest batch that fits is known.

    Args:
      limit: seconds that one compilation may take.
    """

    def compiled(samples: int) -> dict[str, Any]:
        case = Case(system, "train", target.name)
        order = {
            "case": dataclasses.asdict(case),
            "fit": dataclasses.asdict(dataclasses.replace(fit, samples=samples)),
            "cache": None,
            "details": True,
            "steps": 0,
        }
        return run_measurement(order, limit)

    found = compiled(fit.samples)
    largest = None
    if search and found["status"] in (OK, NO_ROOM):
        step = found["granule"]
        largest = largest_batch(lambda samples: compiled(samples)["status"] == OK, fit.samples, step, found)
    memory = found.get("memory", {}) | {name: found[name] for name in ("state", "batch") if name in found}
    program = found.get("hlo", {})
    collectives = program.get("collectives", {})
    total, chip = moved_bytes(collectives), target.chip
    return Answer(
        system=system,
        status=found["status"],
        message=found.get("message", ""),
        samples=fit.samples,
        memory=memory,
        collectives=collectives,
        selecting_collectives=program["selecting_collectives"] if program.get("selecting") else None,
        seconds=found.get("estimated_seconds"),
        network_seconds=total / chip.network if chip and chip.network else None,
        flops=found.get("analytic_flops"),
        largest=largest,
    )


def moved_bytes(collectives: Mapping[str, Mapping[str, float]]) -> float:
    """Bytes that a device sends, nearly: those of the results, twice for all-reduce, which reduces and then gathers."""
    return sum((2 if kind == "all-reduce" else 1) * entry["bytes"] for kind, entry in collectives.items())


def largest_batch(fits: Callable[[int], bool], first: int, step: int, found: Mapping[str, Any]) -> int:
    """The largest multiple of `step` that fits, by bisection; 0: none.

    Args:
      fits: asks the compiler.
      first: a batch that was compiled already, with `found`.
    """
    low, high = (first, None) if found["status"] == OK else (0, first)
    while high is None:
        if not fits(2 * low):
            high = 2 * low
        else:
            low *= 2
    while high - low > step:
        middle = low + max(step, (high - low) // 2 // step * step)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def table(answers: list[Answer], target: Target, devices: int, title: str) -> Table:
    """The answers for people, a column each."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("")
    shown.add_column("")
    for answer in answers:
        shown.add_column(answer.system, justify="right", overflow="fold")
    chip = target.chip

    def row(name: str, source: str, value: Callable[[Answer], str]) -> None:
        shown.add_row(name, source, *(value(answer) for answer in answers))

    row("fits", "compiler", lambda a: "yes" if a.status == OK else f"{a.status}: {a.message[:200]}")
    row("batch", "", lambda a: str(a.samples))
    if any(answer.largest is not None for answer in answers):
        row("largest batch that fits", "compiler", lambda a: _text(a.largest))
    for name, key in (
        ("parameters and optimiser", "state"),
        ("batch's arrays", "batch"),
        ("temporary: activations, gradients", "temporary"),
        ("peak", "peak"),
    ):
        row(f"{name}, a device", "counted", lambda a, key=key: size(a.memory.get(key)))
    if chip is not None:
        row("HBM, a device", "data sheet", lambda a: size(chip.memory))
    for kind in sorted({kind for answer in answers for kind in answer.collectives}):
        row(
            f"{kind}, a device and step",
            "counted",
            lambda a, kind=kind: (
                f"{a.collectives[kind]['count']:.0f}, {size(a.collectives[kind]['bytes'])}"
                if kind in a.collectives
                else ""
            ),
        )
    row("collectives in selection", "counted", lambda a: _text(a.selecting_collectives))
    row("TFLOP a step, all devices", "counted", lambda a: f"{a.flops / 1e12:,.0f}" if a.flops else "")
    row("step without collectives", "estimated", lambda a: f"{a.seconds:.3g} s" if a.seconds else "")
    row("collectives alone", "estimated", lambda a: f"{a.network_seconds:.3g} s" if a.network_seconds else "")
    row("utilisation, collectives hidden", "estimated", lambda a: _share(utilisation(a, target, devices, False)))
    row("utilisation, none hidden", "estimated", lambda a: _share(utilisation(a, target, devices, True)))
    return shown


def utilisation(answer: Answer, target: Target, devices: int, waiting: bool) -> float | None:
    """Model FLOP utilisation that the estimates imply: counted operations over the chips' peak in the estimated time.

    Args:
      waiting: every collective is waited for; otherwise they run beside the computation as far as they are shorter.
    """
    if not (answer.seconds and answer.flops and target.chip):
        return None
    network = answer.network_seconds or 0.0
    seconds = answer.seconds + network if waiting else max(answer.seconds, network)
    return answer.flops / (target.chip.flops * devices * seconds)


def _text(value: int | None) -> str:
    return "" if value is None else str(value)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def run_fit(settings: Mapping[str, Any], options: Mapping[str, Any]) -> list[Answer]:
    """Asks about all of options["systems"] and prints a table; see the flags of this file.

    Raises:
      ConfigError, MissingCompiler: in one sentence.
    """
    target = parse_target(options["topology"])
    if target.chip is None:
        raise ConfigError(f"--topology is {target.name!r}; name chips, such as v5e:16x16, v5p:4x4x4 or h100:8")
    if settings.get("task") != "llava":
        raise ConfigError("--config must be one of configs/train_llava.py")
    check_installed(target)
    devices, console = target.devices, Console(width=None if sys.stdout.isatty() else 140)
    answers = []
    for system in options["systems"].split(","):
        fit = fit_of(settings, options["preset"], system.strip(), devices)
        console.print(f"compiling {system} for {target.name}", highlight=False)
        answers.append(ask(fit, system.strip(), target, options["time_limit"], options["largest"]))
    sizes = from_dict(fit.partition, PartitionConfig, "partition.").shape(devices)
    mesh = " x ".join(f"{axis} {part}" for axis, part in zip(AXES, sizes, strict=True))
    title = (
        f"{options['preset']} on {target.name}: {devices} devices, {mesh}; T = slots + {fit.text}, R = {fit.readers}"
    )
    console.print(table(answers, target, devices, title))
    console.print("estimated: by the compiler and from data sheets; nothing was run", highlight=False)
    if options["json"]:
        write_whole(Path(options["json"]), json.dumps([dataclasses.asdict(a) for a in answers], indent=1) + "\n")
    return answers


def main() -> None:
    """The command."""
    flags.DEFINE_string("topology", None, "Chips to compile for, such as v5e:16x16.", required=True)
    flags.DEFINE_string("preset", "7b", "Model: 7b, 13b, mini, tiny.")
    flags.DEFINE_string(
        "systems", AS_CONFIGURED, "Ways to read the picture, by comma: model (as configured), lowres, ..."
    )
    flags.DEFINE_bool("largest", False, "Find the largest batch that fits, which takes several compilations.")
    flags.DEFINE_float("time_limit", 3600.0, "Seconds that one compilation may take.")
    flags.DEFINE_string("json", "", "File for the answers.")
    names = ("topology", "preset", "systems", "largest", "time_limit", "json")
    run_command(
        lambda settings: run_fit(settings, {name: flags.FLAGS[name].value for name in names}),
        _CONFIG,
        (ConfigError, MissingCompiler, OSError),
    )


if __name__ == "__main__":
    main()
