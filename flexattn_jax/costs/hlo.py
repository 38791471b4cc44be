"""Reads the text of a compiled program: loops and how often they turn, estimated cycles, bytes, collectives.

XLA's own totals count the body of a loop once. Here every instruction that is executed is met with the number of times
that it is: the product of the turns of the loops around it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterator

from flexattn_jax.highres.flexattention import LAYER_SCOPE

BYTES = {"pred": 1, "token": 0, "bf16": 2, "c64": 8, "c128": 16} | {
    f"{kind}{bits}": bits / 8 for kind in "suf" for bits in (2, 4, 8, 16, 32, 64)
}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "ragged-all-to-all")
NO_ESTIMATE = 2**63 - 1  # what the compiler writes where it makes none

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^{}]*\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_ALIASES = re.compile(r"output_to_operand_aliasing=\{((?:\{\d*\}: \(\d+, \{\}\)(?:, )?)*)\}")
_ALIAS = re.compile(r"\{(\d*)\}: \((\d+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all")
_SLICES = ("dynamic-slice", "slice", "gather")
# Which operand holds what is written: the compiler updates the first one in place.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    arguments: str  # what stands between the parentheses
    attributes: str
    is_root: bool


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, each with its instructions by name, in order."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What is assumed of a program where its text cannot tell, since it depends on data.

    projecting: turns of a loop that takes no exponentials, as those do that project cells.
    reading: turns of one that does, as those do that attend to them.
    flex_layers: share of a stack's layers that meet the condition for FlexAttention (`LAYER_SCOPE`).
    """

    projecting: float = 1.0
    reading: float = 1.0
    flex_layers: float = 1.0

    def turns(self, exponentials: bool) -> float:
        """Turns of a loop."""
        return self.reading if exponentials else self.projecting

    def share(self, path: str) -> float:
        """How often a condition that came about at `path` is met; 1 of those that nothing is known of."""
        return self.flex_layers if path.endswith(f"{LAYER_SCOPE}/cond") else 1.0


AS_WRITTEN = Assumed()  # every loop that the text does not tell turns once, every condition is met


def parse(text: str) -> Module:
    """The module that `compiled.as_text()` prints."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found[2], found[3], bool(found[1]))
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text holds no ENTRY computation; is it an HLO module?")
    return Module(computations, entry)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    kind, rest = _split_type(rest)
    opcode, _, rest = rest.partition("(")
    end = _closing(rest)
    arguments = rest[:end]
    return Instruction(
        name=name,
        opcode=opcode.strip(),
        type=kind,
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        attributes=rest[end + 1 :],
        is_root=is_root,
    )


def _split_type(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    end = _closing(text[1:]) + 2
    return text[:end], text[end:].lstrip()


def _closing(text: str) -> int:
    """Place of the parenthesis that closes one opened before `text`."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def walk(module: Module, assumed: Assumed = AS_WRITTEN) -> Iterator[tuple[str, Instruction, float]]:
    """Executed instructions with the computation that they stand in and how often they are executed.

    All branches of a conditional are met, as often as is assumed. What is inside of a fusion is not: the fusion is.
    """
    stack = [(module.entry, 1.0)]
    while stack:
        computation, times = stack.pop()
        for instruction in module.computations[computation].values():
            yield computation, instruction, times
            if instruction.opcode == "while":
                turns = trip_count(module, computation, instruction)
                if turns is None:
                    turns = assumed.turns(takes_exponentials(module, _body(instruction)))
                stack.append((_body(instruction), times * turns))
            elif instruction.opcode == "conditional":
                share = assumed.share(path_of(instruction))
                stack += [(name, times * share) for name in _branches(instruction)]
            elif instruction.opcode in ("call", "async-start"):
                stack += [(name, times) for name in _CALLED.findall(instruction.attributes)]


def unknown_loops(module: Module) -> int:
    """Loops whose number of turns the text does not tell."""
    return sum(
        instruction.opcode == "while" and trip_count(module, computation, instruction) is None
        for computation, instruction, _ in walk(module)
    )


def trip_count(module: Module, computation: str, loop: Instruction) -> int | None:
    """Turns of a while loop that counts up to a constant; None where they depend on data."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(known[1])
    condition = module.computations[re.search(r"condition=%?([\w.\-]+)", loop.attributes)[1]]
    root = next(i for i in condition.values() if i.is_root)
    # The comparison may stand in a fusion of its own, whose parameters are then the root's operands.
    compare, outer = root, None
    if root.opcode == "fusion":
        inner = module.computations[_CALLED.search(root.attributes)[1]]
        compare, outer = next(i for i in inner.values() if i.is_root), (inner, root)
    direction = re.search(r"direction=(\w+)", compare.attributes)
    if compare.opcode != "compare" or direction is None or direction[1] not in ("LT", "LE", "GT", "GE"):
        return None
    left, right = (_resolve(condition, name, outer) for name in compare.operands)
    if direction[1] in ("GT", "GE"):
        left, right = right, left
    if left is None or left.opcode != "get-tuple-element":
        return None
    place = _index(left)
    carried = module.computations[computation].get(loop.operands[0])
    start = _constant_at(module.computations[computation], carried, place)
    limit = _number(right) if right is not None else None
    if limit is None and right is not None and right.opcode == "get-tuple-element":
        limit = _invariant(module, computation, loop, _index(right))
    step = _step(module, computation, loop, place)
    if start is None or limit is None or not step or step < 0:
        return None
    return max(0, -(-(limit + (direction[1] in ("LE", "GE")) - start) // step))


def _resolve(condition: dict[str, Instruction], name: str, outer) -> Instruction | None:
    """The instruction of the condition behind an operand of its comparison."""
    if outer is not None:
        inner, fusion = outer
        operand = inner[name]
        if operand.opcode == "parameter":
            return condition.get(fusion.operands[int(operand.arguments)])
        return operand
    return _behind(condition, name)


def _behind(computation: dict[str, Instruction], name: str) -> Instruction | None:
    """The instruction of that name, seen through copies."""
    found = computation.get(name)
    while found is not None and found.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        found = computation.get(found.operands[0])
    return found


def _constant_at(computation: dict[str, Instruction], carried: Instruction | None, place: int) -> int | None:
    if carried is None or carried.opcode != "tuple" or place >= len(carried.operands):
        return None
    found = _behind(computation, carried.operands[place])
    return None if found is None else _number(found)


def _invariant(module: Module, computation: str, loop: Instruction, place: int) -> int | None:
    """A constant that the loop carries along unchanged."""
    body = module.computations[_body(loop)]
    root = next(i for i in body.values() if i.is_root)
    if root.opcode != "tuple":
        return None
    passed = _behind(body, root.operands[place])
    if passed is None or passed.opcode != "get-tuple-element" or _index(passed) != place:
        return None
    around = module.computations[computation]
    return _constant_at(around, around.get(loop.operands[0]), place)


def _step(module: Module, computation: str, loop: Instruction, place: int) -> int | None:
    """What a turn adds to the entry `place` of the loop's tuple; None where that is no constant."""
    body = module.computations[_body(loop)]
    root = next(i for i in body.values() if i.is_root)
    update = _behind(body, root.operands[place]) if root.opcode == "tuple" else None
    if update is None:
        return None
    operands = [_behind(body, name) for name in update.operands]
    if update.opcode == "fusion":  # of the addition alone
        inner = module.computations[_CALLED.search(update.attributes)[1]]
        update = next(i for i in inner.values() if i.is_root)
        found = [inner[name] for name in update.operands]
        operands = [operands[int(i.arguments)] if i.opcode == "parameter" else i for i in found]
    if update.opcode != "add":
        return None
    for operand in operands:
        number = _number(operand)
        if number is None and operand is not None and operand.opcode == "get-tuple-element":
            number = None if _index(operand) == place else _invariant(module, computation, loop, _index(operand))
        if number is not None:
            return number
    return None


def _index(instruction: Instruction) -> int:
    return int(re.search(r"index=(\d+)", instruction.attributes)[1])


def _number(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None


def _body(loop: Instruction) -> str:
    return re.search(r"body=%?([\w.\-]+)", loop.attributes)[1]


def _branches(instruction: Instruction) -> list[str]:
    names = []
    for several, one in _BRANCHES.findall(instruction.attributes):
        names += re.findall(r"[\w.\-]+", several) if several else [one]
    return names


def takes_exponentials(module: Module, computation: str) -> bool:
    """Whether a computation, or what it calls, takes exponentials: the mark of a loop that attends."""
    return any(
        instruction.opcode == "exponential"
        or any(takes_exponentials(module, name) for name in _CALLED.findall(instruction.attributes))
        for instruction in module.computations.get(computation, {}).values()
    )


def array_bytes(kind: str, space: int | None = None) -> float:
    """Bytes of a type, a tuple's entries together; with `space` only of arrays in that memory (0: HBM)."""
    total = 0.0
    for dtype, shape, layout in ARRAY.findall(kind):
        if dtype not in BYTES and not dtype.startswith("f8"):
            continue
        where = re.search(r"S\((\d+)\)", layout)
        if space is not None and int(where[1] if where else 0) != space:
            continue
        total += BYTES.get(dtype, 1) * math.prod(int(n.lstrip("<=")) for n in shape.split(",") if n)
    return total


def path_of(instruction: Instruction) -> str:
    """Where in the traced program an instruction comes from; "" where the compiler does not say."""
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def in_scope(path: str, scope: str) -> bool:
    """Whether an operation of that path, or what it is the gradient of, came about under `jax.named_scope(scope)`."""
    return scope in re.split(r'[/()"]', path)


def hbm_bytes(module: Module, computation: str, instruction: Instruction) -> float:
    """Bytes that one execution reads from and writes to HBM.

    Of an array that is only sliced, the slices count; of one that is updated in place, the update. Of a collective that
    goes on beside several fusions (`started_collective`), its buffers count once, where it starts.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or '"AllocateBuffer"' in instruction.attributes:
        return 0.0
    around = module.computations[computation]
    operands = [around[name].type if name in around else "" for name in instruction.operands]
    if opcode in _SLICES:
        return 2 * array_bytes(instruction.type, 0)
    if opcode in _UPDATES:
        return 2 * array_bytes(operands[_UPDATES[opcode]], 0)
    if opcode == "fusion":
        called = _CALLED.search(instruction.attributes)[1]
        passed = _passed_on(module, instruction)
        read = sum(_read_bytes(module, called, i, kind) for i, kind in enumerate(operands) if i not in passed.values())
        return read + _written_bytes(module, called, instruction.type, tuple(passed))
    if opcode.endswith("-start"):
        return _transfer_bytes(opcode, operands, instruction.type)
    return sum(array_bytes(kind, 0) for kind in operands) + array_bytes(instruction.type, 0)


def _transfer_bytes(opcode: str, operands: list[str], kind: str) -> float:
    """Bytes of an asynchronous transfer, whose type lists what it reads and what it writes, in one order or another."""
    arrays = [f"{dtype}[{shape}]{layout}" for dtype, shape, layout in ARRAY.findall(kind)]
    if opcode == "copy-start":  # (written, read, a semaphore)
        return array_bytes(arrays[0], 0) + array_bytes(arrays[1], 0)
    if opcode == "slice-start":  # ((read), written, a semaphore): of what is read only the slice
        from_hbm = array_bytes(arrays[1]) if array_bytes(arrays[0], 0) else 0.0
        return from_hbm + array_bytes(arrays[1], 0)
    return sum(array_bytes(operand, 0) for operand in operands) + array_bytes(arrays[-1], 0)


def _read_bytes(module: Module, computation: str, number: int, kind: str) -> float:
    """Bytes of parameter `number`, of type `kind`, that a fused computation reads."""
    full, instructions = array_bytes(kind, 0), module.computations[computation]
    parameter = next((i for i in instructions.values() if i.opcode == "parameter" and i.arguments == str(number)), None)
    if parameter is None or not full:
        return full
    total, names = 0.0, [parameter.name]
    while names:
        name = names.pop()
        for user in instructions.values():
            if name not in user.operands:
                continue
            place = user.operands.index(name)
            if user.opcode in _SLICES and place == 0:
                total += array_bytes(user.type)
            elif user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode == "fusion":
                total += _read_bytes(module, _CALLED.search(user.attributes)[1], place, kind)
            elif not (user.opcode in _UPDATES and place == 0):
                return full
    return min(total, full)


def _written_bytes(module: Module, computation: str, kind: str, passed: tuple[int, ...] = ()) -> float:
    """Bytes that a fused computation with a result of type `kind` writes; not what is in the places `passed`."""
    instructions = module.computations[computation]
    root = next(i for i in instructions.values() if i.is_root)
    results = [instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if root.opcode != "tuple" and kind.startswith("("):  # a custom call that gives several
        kinds = [f"{dtype}[{shape}]{layout}" for dtype, shape, layout in ARRAY.findall(kind)]
        return sum(array_bytes(kind, 0) for place, kind in enumerate(kinds) if place not in passed)
    total = 0.0
    for place, result in enumerate(results):
        if place in passed:
            continue
        while result.opcode == "bitcast" and result.operands[0] in instructions:
            result = instructions[result.operands[0]]
        if result.opcode in _UPDATES:
            total += array_bytes(instructions[result.operands[_UPDATES[result.opcode]]].type)
        else:
            total += array_bytes(result.type)
    return min(total, array_bytes(kind, 0))


def started_collective(module: Module, instruction: Instruction) -> Instruction | None:
    """The collective that a fusion starts; None for any other instruction.

    TPU's compiler lets a collective go on beside several computations: a fusion starts it, those that it goes on beside
    hand its buffers on, and another one ends it. All of them name the collective, in loops, too; it happens once.
    """
    inside = _fused(module, instruction)
    if not any('"AsyncCollectiveStart"' in i.attributes for i in inside):
        return None
    return next((i for i in inside if i.opcode in COLLECTIVES), None)


def _fused(module: Module, instruction: Instruction) -> Collection[Instruction]:
    """What a fusion holds; of any other instruction, nothing."""
    if instruction.opcode != "fusion":
        return ()
    return module.computations[_CALLED.search(instruction.attributes)[1]].values()


def _passed_on(module: Module, instruction: Instruction) -> dict[int, int]:
    """Places of results of a fusion, and of the operands that they are, which a collective beside it needs."""
    found = _ALIASES.search(instruction.attributes)
    if not found or not any(i.opcode in COLLECTIVES for i in _fused(module, instruction)):
        return {}
    return {int(result or 0): int(operand) for result, operand in _ALIAS.findall(found[1])}


def estimated_cycles(instruction: Instruction) -> int | None:
    """The compiler's own estimate for one execution; None where it makes none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    cycles = int(found[1]) if found else None
    return None if cycles == NO_ESTIMATE else cycles
