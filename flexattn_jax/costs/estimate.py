"""What a compiled program tells of a step before any chip has run it: the compiler's cycles, bytes, collectives.

All of it is for one device. Nothing here is a measurement.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flexattn_jax.costs import hlo
from flexattn_jax.costs.targets import Chip
from flexattn_jax.ops.selection import SCOPE

# Transfers that run beside computation: what they move is in the bytes, not in the cycles.
_ASYNCHRONOUS = ("copy-start", "slice-start", "call-start", "async-start", *(f"{c}-start" for c in hlo.COLLECTIVES))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Totals of one execution of the program, loop bodies times their turns.

    instructions: in the text, whatever their turns.
    cycles: sum of the compiler's own estimates; 0 where the back end makes none.
    unestimated_bytes: HBM bytes of gathers, scatters and other work that the compiler puts no cycles to.
    hbm_bytes: bytes read from and written to HBM, asynchronous copies included.
    collectives: kind -> {"count", "bytes"}, bytes of the results; their time is not in the cycles.
    data_loops: loops whose turns depend on data; `walk` was told how many turns to assume.
    selecting: instructions that choose and gather cells (`ops.selection.SCOPE`), whatever their turns.
    selecting_collectives: those of them that move data between devices.
    """

    instructions: int
    cycles: float
    unestimated_bytes: float
    hbm_bytes: float
    collectives: dict[str, dict[str, float]]
    data_loops: int
    selecting: int
    selecting_collectives: int

    def to_dict(self) -> dict[str, Any]:
        """As plain types."""
        return dataclasses.asdict(self)


def estimate(text: str, assumed: hlo.Assumed = hlo.AS_WRITTEN) -> Estimate:
    """Reads `compiled.as_text()`; `assumed` as in `hlo.walk`."""
    module = hlo.parse(text)
    cycles = unestimated = total = 0.0
    collectives: dict[str, dict[str, float]] = {}
    selecting = selecting_collectives = 0
    for computation, instruction, times in hlo.walk(module, assumed):
        moved = hlo.hbm_bytes(module, computation, instruction) * times
        own = hlo.estimated_cycles(instruction)
        # TPU's compiler also starts collectives in fusions.
        collective = hlo.started_collective(module, instruction) or instruction
        kind = collective.opcode.removesuffix("-start")
        if _selects(instruction):
            selecting += 1
            selecting_collectives += kind in hlo.COLLECTIVES
        if kind in hlo.COLLECTIVES:
            entry = collectives.setdefault(kind, {"count": 0.0, "bytes": 0.0})
            entry["count"] += times
            entry["bytes"] += _result_bytes(collective) * times
        elif own is not None:
            cycles += own * times
        elif instruction.opcode not in _ASYNCHRONOUS:
            unestimated += moved
        total += moved
    return Estimate(
        instructions=sum(map(len, module.computations.values())),
        cycles=cycles,
        unestimated_bytes=unestimated,
        hbm_bytes=total,
        collectives=dict(sorted(collectives.items())),
        data_loops=hlo.unknown_loops(module),
        selecting=selecting,
        selecting_collectives=selecting_collectives,
    )


def estimated_seconds(found: Estimate, chip: Chip | None) -> float | None:
    """The larger of computing (cycles at the clock, and unestimated bytes at HBM's speed) and of moving all bytes.

    None where the compiler estimates no cycles or the chip's clock is not known. Collectives are not in it.
    """
    if chip is None or chip.clock is None or not found.cycles:
        return None
    computing = found.cycles / chip.clock + found.unestimated_bytes / chip.bandwidth
    return max(computing, found.hbm_bytes / chip.bandwidth)


def roofline_seconds(flops: float, hbm_bytes: float, chip: Chip | None) -> float | None:
    """What one device needs at least: its operations at the peak, or its bytes at HBM's speed."""
    return None if chip is None else max(flops / chip.flops, hbm_bytes / chip.bandwidth)


def _selects(instruction: hlo.Instruction) -> bool:
    return hlo.in_scope(hlo.path_of(instruction), SCOPE)


def _result_bytes(instruction: hlo.Instruction) -> float:
    """Bytes of a collective's result; an asynchronous one lists its operand before it."""
    if not instruction.opcode.endswith("-start") or instruction.opcode == "all-reduce-start":
        return hlo.array_bytes(instruction.type)
    arrays = [hlo.array_bytes(f"{dtype}[{shape}]") for dtype, shape, _ in hlo.ARRAY.findall(instruction.type)]
    return max(arrays, default=0.0)
