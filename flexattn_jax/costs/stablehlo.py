"""Counts on a lowered program, before any back end has touched it: operations, FLOPs, loops, rankings, constraints."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from jax import stages
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo as dialect

from flexattn_jax.costs.hlo import AS_WRITTEN, Assumed, in_scope
from flexattn_jax.ops.rope import SCOPE

_RANKINGS = ("stablehlo.sort", "chlo.top_k")


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a lowered program holds.

    operations: operations in the text, whatever their turns: what compile time follows.
    flops: of products and convolutions (a multiply-add is two), loop bodies times their turns, on all devices together;
      without products that only move numbers (`ops.rope.SCOPE`), and without sums of elementwise products.
    data_loops: loops whose turns depend on data.
    rankings: (operation, length of the axis that it ranks) of every sort and top_k.
    constraints: sharding constraints.
    """

    operations: int
    flops: float
    data_loops: int
    rankings: tuple[tuple[str, int], ...]
    constraints: int

    def to_dict(self) -> dict[str, Any]:
        """As plain types."""
        return dataclasses.asdict(self) | {"rankings": [list(entry) for entry in self.rankings]}


def count(lowered: stages.Lowered, assumed: Assumed = AS_WRITTEN) -> Counts:
    """Counts a program; `assumed`: see `hlo.walk`."""
    module = lowered.compiler_ir("stablehlo")
    functions = {_symbol(op): op for op in module.body.operations if op.operation.name == "func.func"}
    every = [op for op in _nested(module.operation) if op.name not in ("func.func", "builtin.module")]
    totals = _Totals(functions, assumed)
    flops, loops = totals.of(functions["main"])
    names = collections.Counter(op.name for op in every)
    return Counts(
        operations=len(every),
        flops=flops,
        data_loops=loops,
        rankings=tuple((op.name, _ranked_length(op)) for op in every if _ranks(op)),
        constraints=names["sdy.sharding_constraint"] + sum(_is_call(op, "Sharding") for op in every),
    )


class _Totals:
    """FLOPs and data-dependent loops of functions, each function counted once however often it is called."""

    def __init__(self, functions: dict[str, Any], assumed: Assumed):
        self._functions, self._assumed = functions, assumed
        self._known: dict[str, tuple[float, int]] = {}

    def of(self, function: Any) -> tuple[float, int]:
        name = _symbol(function)
        if name not in self._known:
            self._known[name] = self._region(function.operation)
        return self._known[name]

    def _region(self, parent: Any) -> tuple[float, int]:
        flops, loops = 0.0, 0
        for op in _children(parent):
            own_flops, own_loops = self._one(op)
            flops, loops = flops + own_flops, loops + own_loops
        return flops, loops

    def _one(self, op: Any) -> tuple[float, int]:
        if op.name == "stablehlo.dot_general":
            return (0.0 if in_scope(str(op.location), SCOPE) else _dot_flops(op)), 0
        if op.name == "stablehlo.convolution":
            return _convolution_flops(op), 0
        if op.name == "func.call":
            return self.of(self._functions[op.attributes["callee"].value])
        flops, loops = self._region(op)
        if op.name == "stablehlo.case":
            paths = re.findall(r'"([^"]*)"', str(op.location))
            return flops * min(map(self._assumed.share, paths), default=1.0), loops
        if op.name != "stablehlo.while":
            return flops, loops
        turns = trip_count(op)  # the condition multiplies nothing
        if turns is not None:
            return flops * turns, loops
        return flops * self._assumed.turns(self._exponentials(op)), loops + 1

    def _exponentials(self, op: Any) -> bool:
        return any(
            o.name == "stablehlo.exponential"
            or (o.name == "func.call" and self._exponentials(self._functions[o.attributes["callee"].value].operation))
            for o in _nested(op)
        )


def trip_count(loop: Any) -> int | None:
    """Turns of a stablehlo.while that counts from one constant to another; None where they depend on data."""
    condition, body = (region.blocks[0] for region in loop.regions)
    compare = _owner(_last(condition).operands[0])
    if compare is None or compare.name != "stablehlo.compare":
        return None
    if dialect.ComparisonDirectionAttr(compare.attributes["comparison_direction"]).value != "LT":
        return None
    counter, limit = map(_unconstrained, compare.operands)
    places = [i for i, argument in enumerate(condition.arguments) if argument == counter]
    if not places:
        return None
    start, limit = _number(loop.operands[places[0]]), _number(limit)
    add = _owner(_last(body).operands[places[0]])
    if add is None or add.name != "stablehlo.add":
        return None
    step = next((n for n in map(_number, add.operands) if n is not None), None)
    return None if start is None or limit is None or not step else max(0, -(-(limit - start) // step))


def _children(op: Any) -> Iterator[Any]:
    for region in op.regions:
        for block in region.blocks:
            for child in block.operations:
                yield child.operation


def _nested(op: Any) -> Iterator[Any]:
    for child in _children(op):
        yield child
        yield from _nested(child)


def _symbol(function: Any) -> str:
    return ir.StringAttr(function.attributes["sym_name"]).value


def _last(block: Any) -> Any:
    return list(block.operations)[-1].operation


def _owner(value: Any) -> Any:
    """The operation that makes a value, sharding aside; None for a block's argument."""
    owner = _unconstrained(value).owner
    return None if isinstance(owner, ir.Block) else owner


def _unconstrained(value: Any) -> Any:
    """The value before its sharding was constrained."""
    while not isinstance(value.owner, ir.Block) and value.owner.name == "sdy.sharding_constraint":
        value = value.owner.operands[0]
    return value


def _number(value: Any) -> int | None:
    owner = _owner(value)
    if owner is None or owner.name != "stablehlo.constant":
        return None
    constant = ir.DenseIntElementsAttr(owner.attributes["value"])
    return int(constant[0]) if len(constant) == 1 else None


def _shape(value: Any) -> list[int]:
    return list(ir.RankedTensorType(value.type).shape)


def _dot_flops(op: Any) -> float:
    contracted = dialect.DotDimensionNumbers(op.attributes["dot_dimension_numbers"]).lhs_contracting_dimensions
    left = _shape(op.operands[0])
    return 2.0 * math.prod(_shape(op.results[0])) * math.prod(left[i] for i in contracted)


def _convolution_flops(op: Any) -> float:
    kernel = _shape(op.operands[1])
    outputs = kernel[dialect.ConvDimensionNumbers(op.attributes["dimension_numbers"]).kernel_output_feature_dimension]
    return 2.0 * math.prod(_shape(op.results[0])) * math.prod(kernel) / outputs


def _is_call(op: Any, target: str) -> bool:
    return op.name == "stablehlo.custom_call" and ir.StringAttr(op.attributes["call_target_name"]).value == target


def _ranks(op: Any) -> bool:
    return op.name in _RANKINGS or _is_call(op, "ApproxTopK") or _is_call(op, "TopK") or _is_call(op, "mhlo.topk")


def _ranked_length(op: Any) -> int:
    axis = ir.IntegerAttr(op.attributes["dimension"]).value if op.name == "stablehlo.sort" else -1
    return _shape(op.operands[0])[axis]
