"""The reader of compiled programs, on texts small enough to count by hand."""

import jax
import jax.numpy as jnp
import pytest

from flexattn_jax.costs import hlo
from flexattn_jax.costs.estimate import estimate, estimated_seconds, roofline_seconds
from flexattn_jax.costs.targets import Chip

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'

# A loop of 7 turns around a loop that depends on data, as a TPU's compiler writes them.
PROGRAM = f"""HloModule jit_f, is_scheduled=true, entry_computation_layout={{(bf16[64,8]{{1,0}})->bf16[64,8]{{1,0}}}}

%wrapped (p0: s32[], p1: s32[]) -> pred[] {{
  %p0 = s32[]{{:T(128)}} parameter(0)
  %p1 = s32[]{{:T(128)}} parameter(1)
  ROOT %lt.9 = pred[] compare(%p0, %p1), direction=LT
}}

%fused (q0: bf16[64,8], q1: s32[]) -> bf16[1,8] {{
  %q0 = bf16[64,8]{{1,0:T(8,128)(2,1)}} parameter(0)
  %q1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = bf16[1,8]{{1,0:T(8,128)(2,1)}} dynamic-slice(%q0, %q1, %zero), dynamic_slice_sizes={{1,8}}
}}

%attending (a0: bf16[1,8]) -> bf16[1,8] {{
  %a0 = bf16[1,8]{{1,0}} parameter(0)
  ROOT %exp = bf16[1,8]{{1,0}} exponential(%a0)
}}

%inner_condition (c: (s32[], s32[], bf16[64,8])) -> pred[] {{
  %c = (s32[], s32[], bf16[64,8]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] get-tuple-element(%c), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}

%inner_body (b: (s32[], s32[], bf16[64,8])) -> (s32[], s32[], bf16[64,8]) {{
  %b = (s32[], s32[], bf16[64,8]{{1,0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%b), index=0
  %n.1 = s32[] get-tuple-element(%b), index=1
  %x.1 = bf16[64,8]{{1,0:T(8,128)(2,1)}} get-tuple-element(%b), index=2
  %one.1 = s32[] constant(1)
  %row.1 = bf16[1,8]{{1,0}} fusion(%x.1, %i.1), kind=kLoop, calls=%fused, {CYCLES % 10}
  %exp.1 = bf16[1,8]{{1,0:T(8,128)(2,1)S(1)}} fusion(%row.1), kind=kLoop, calls=%attending, {CYCLES % 100}
  %next.1 = s32[] add(%i.1, %one.1)
  ROOT %tuple.1 = (s32[], s32[], bf16[64,8]{{1,0}}) tuple(%next.1, %n.1, %x.1)
}}

%condition (c.2: (s32[], bf16[64,8], s32[])) -> pred[] {{
  %c.2 = (s32[], bf16[64,8]{{1,0}}, s32[]) parameter(0)
  %i.2 = s32[] get-tuple-element(%c.2), index=0
  %seven = s32[] constant(7)
  ROOT %lt.2 = pred[] fusion(%i.2, %seven), kind=kLoop, calls=%wrapped
}}

%body (b.2: (s32[], bf16[64,8], s32[])) -> (s32[], bf16[64,8], s32[]) {{
  %b.2 = (s32[], bf16[64,8]{{1,0}}, /*index=2*/s32[]) parameter(0)
  %i.3 = s32[] get-tuple-element(%b.2), index=0
  %x.3 = bf16[64,8]{{1,0}} get-tuple-element(%b.2), index=1
  %one.3 = s32[] get-tuple-element(%b.2), index=2
  %count = s32[] custom-call(%x.3), custom_call_target="Count"
  %start = s32[] constant(0)
  %entry = (s32[], s32[], bf16[64,8]{{1,0}}) tuple(%start, %count, %x.3)
  %inner = (s32[], s32[], bf16[64,8]{{1,0}}) while(%entry), condition=%inner_condition, body=%inner_body
  %sum = bf16[64,8]{{1,0}} all-reduce(%x.3), channel_id=1, to_apply=%wrapped
  %next.3 = s32[] add(%i.3, %one.3)
  ROOT %tuple.3 = (s32[], bf16[64,8]{{1,0}}, s32[]) tuple(%next.3, %sum, %one.3)
}}

ENTRY %main (x: bf16[64,8]) -> bf16[64,8] {{
  %x = bf16[64,8]{{1,0}} parameter(0)
  %zero.4 = s32[] constant(0)
  %from = s32[] copy(%zero.4)
  %one.4 = s32[] constant(1)
  %state = (s32[], bf16[64,8]{{1,0}}, s32[]) tuple(%from, %x, %one.4)
  %loop = (s32[], bf16[64,8]{{1,0}}, s32[]) while(%state), condition=%condition, body=%body
  %y = bf16[64,8]{{1,0}} get-tuple-element(%loop), index=1
  ROOT %z = bf16[64,8]{{1,0}} copy(%y), {CYCLES % hlo.NO_ESTIMATE}
}}
"""


@pytest.fixture(scope="module")
def module():
    return hlo.parse(PROGRAM)


def loops(module):
    return {i.name: hlo.trip_count(module, c, i) for c, i, _ in hlo.walk(module) if i.opcode == "while"}


def test_turns_are_read_through_fusions_copies_and_what_a_loop_carries_along(module):
    assert module.entry == "main"
    assert loops(module) == {"loop": 7, "inner": None}
    assert hlo.unknown_loops(module) == 1


@pytest.mark.parametrize(
    ("old", "new", "turns"),
    [
        ("direction=LT\n}\n\n%fused", "direction=LE\n}\n\n%fused", 8),
        ("%zero.4 = s32[] constant(0)", "%zero.4 = s32[] constant(2)", 5),
        ("%one.4 = s32[] constant(1)", "%one.4 = s32[] constant(3)", 3),
        ("condition=%condition, body=%body", 'condition=%condition, body=%body, {"known_trip_count":{"n":"9"}}', 9),
        # A step that is itself computed, and a counter that is.
        ("tuple(%next.3, %sum, %one.3)", "tuple(%next.3, %sum, %count)", None),
        ("%from = s32[] copy(%zero.4)", '%from = s32[] custom-call(%zero.4), custom_call_target="F"', None),
    ],
)
def test_turns_follow_start_end_and_step(old, new, turns):
    assert PROGRAM.count(old) == 1
    assert loops(hlo.parse(PROGRAM.replace(old, new)))["loop"] == turns


def test_what_is_executed_counts_as_often_as_it_is(module):
    # The inner loop's body calls an exponential.
    times = {i.name: times for _, i, times in hlo.walk(module, hlo.Assumed(projecting=0, reading=4))}
    assert times["x"] == 1 and times["sum"] == 7 and times["row.1"] == 28
    assert "row" not in times  # the inside of a fusion is the fusion's


def test_an_estimate_adds_cycles_bytes_and_collectives(module):
    found = estimate(PROGRAM, hlo.Assumed(reading=4))
    assert found.cycles == 28 * 110
    row, picture, number = 8 * 2, 64 * 8 * 2, 4
    # Of an array that is sliced in a fusion one row is read; the second fusion's result lies in other memory than HBM.
    inner = (row + number + row) + row + 3 * number  # both fusions and the counter
    outer = (picture + number) + 2 * picture + 3 * number  # the call, the sum over devices and the counter
    assert found.hbm_bytes == 28 * inner + 7 * outer + 2 * picture + 2 * number  # and two copies
    assert found.collectives == {"all-reduce": {"count": 7, "bytes": 7 * picture}}
    assert found.data_loops == 1
    assert found.unestimated_bytes < found.hbm_bytes - 7 * 2 * picture  # neither cycles nor collectives


@pytest.mark.parametrize(
    ("scope", "found"),
    [
        ("jit(f)/while/body/selection/gather", (1, 1)),
        ("jit(f)/transpose(jvp(selection))/add", (1, 1)),
        ("jit(f)/selections/add", (0, 0)),
    ],
)
def test_what_selects_is_known_by_its_scope(scope, found):
    old = "channel_id=1, to_apply=%wrapped"
    assert PROGRAM.count(old) == 1
    counted = estimate(PROGRAM.replace(old, f'{old}, metadata={{op_name="{scope}" stack_frame_id=1}}'))
    assert (counted.selecting, counted.selecting_collectives) == found


def test_seconds_are_of_computing_or_of_moving_whichever_takes_longer():
    found = estimate(PROGRAM, hlo.Assumed(reading=4))
    slow_clock = Chip(flops=1e12, bandwidth=1e12, memory=1e9, clock=1e3)
    assert estimated_seconds(found, slow_clock) == pytest.approx(3.08, rel=1e-3)
    slow_memory = Chip(flops=1e12, bandwidth=1e3, memory=1e9, clock=1e9)
    assert estimated_seconds(found, slow_memory) == pytest.approx(found.hbm_bytes / 1e3)
    assert estimated_seconds(found, Chip(1e12, 1e12, 1e9)) is None  # a clock that is not known
    assert estimated_seconds(found, None) is None
    assert roofline_seconds(2e12, 1e3, slow_clock) == 2
    assert roofline_seconds(1.0, 5e3, slow_memory) == 5


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("bf16[4,8]{1,0:T(8,128)(2,1)S(1)}", 64),
        ("(f32[3]{0}, pred[5]{0}, s4[6]{0}, token[])", 12 + 5 + 3),
        ("f8e4m3fn[10]{0}", 10),
        ("f32[<=7]{0}", 28),
        ("f32[]", 4),
    ],
)
def test_sizes_of_types(kind, size):
    assert hlo.array_bytes(kind) == size


def test_only_one_memory_is_asked_for():
    assert hlo.array_bytes("(bf16[4]{0:S(1)}, f32[2]{0})", 0) == 8
    assert hlo.array_bytes("(bf16[4]{0:S(1)}, f32[2]{0})", 1) == 8


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        # Of a large array a slice goes to other memory: the slice is read.
        ("((bf16[64,8]{1,0}), bf16[4,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:4], [0:8]}", 64),
        ("(bf16[64,8]{1,0:S(1)}, bf16[64,8]{1,0}, u32[]{:S(2)}) copy-start(%x)", 1024),
        ("(bf16[64,8]{1,0}, bf16[64,8]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%x)", 1024),
        ("(bf16[64,8]{1,0}, bf16[128,8]{1,0}) all-gather-start(%x), dimensions={0}", 1024 + 2048),
        ('bf16[64,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"', 0),
    ],
)
def test_bytes_that_one_instruction_moves(line, moved):
    text = f"ENTRY %main (x: bf16[64,8]) -> bf16[64,8] {{\n  %x = bf16[64,8]{{1,0}} parameter(0)\n  %t = {line}\n}}\n"
    module = hlo.parse(text)
    assert hlo.hbm_bytes(module, "main", module.computations["main"]["t"]) == moved


UPDATED = """
%write (p: bf16[64,8], p.1: s32[4,1], p.2: bf16[4,8]) -> bf16[64,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  %p.1 = s32[4,1]{1,0} parameter(1)
  %p.2 = bf16[4,8]{1,0} parameter(2)
  ROOT %s = bf16[64,8]{1,0} scatter(%p, %p.1, %p.2), to_apply=%set
}

ENTRY %main (x: bf16[64,8], i: s32[4,1], u: bf16[4,8]) -> bf16[64,8] {
  %x = bf16[64,8]{1,0} parameter(0)
  %i = s32[4,1]{1,0} parameter(1)
  %u = bf16[4,8]{1,0} parameter(2)
  %alone = bf16[64,8]{1,0} scatter(%x, %i, %u), to_apply=%set
  ROOT %fused = bf16[64,8]{1,0} fusion(%alone, %i, %u), kind=kCustom, calls=%write
}
"""


@pytest.mark.parametrize(("name", "moved"), [("alone", 2 * 64), ("fused", 2 * 64 + 4 * 4)])
def test_rows_that_are_scattered_into_a_large_array_count_and_the_array_does_not(name, moved):
    module = hlo.parse(UPDATED)
    assert hlo.hbm_bytes(module, "main", module.computations["main"][name]) == moved


BESIDE = """
%start (p: bf16[4,8]) -> (bf16[4,8], bf16[64,8], u32[]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %gather = bf16[64,8]{1,0} all-gather(%p), dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %begin = (bf16[4,8]{1,0}, bf16[64,8]{1,0}, u32[]{:S(2)}) custom-call(%gather), custom_call_target="AsyncCollectiveStart"
}

%beside (p.1: bf16[4,8], p.2: bf16[64,8], p.3: f32[3]) -> (f32[3], bf16[4,8], bf16[64,8]) {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  %p.2 = bf16[64,8]{1,0} parameter(1)
  %gather.1 = bf16[64,8]{1,0} all-gather(%p.1), dimensions={0}, frontend_attributes={chain_id="0"}
  %p.3 = f32[3]{0} parameter(2)
  %twice = f32[3]{0} add(%p.3, %p.3)
  ROOT %all = (f32[3]{0}, bf16[4,8]{1,0}, bf16[64,8]{1,0}) tuple(%twice, %p.1, %gather.1)
}

ENTRY %main (x: bf16[4,8], y: f32[3]) -> f32[3] {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = f32[3]{0} parameter(1)
  %s = (bf16[4,8]{1,0}, bf16[64,8]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%start
  %a = bf16[4,8]{1,0} get-tuple-element(%s), index=0
  %b = bf16[64,8]{1,0} get-tuple-element(%s), index=1
  %f = (f32[3]{0}, bf16[4,8]{1,0}, bf16[64,8]{1,0}) fusion(%a, %b, %y), kind=kLoop, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%beside
  ROOT %g = f32[3]{0} get-tuple-element(%f), index=0
}
"""  # noqa: E501


def test_a_collective_beside_computations_happens_once():
    found = estimate(BESIDE)
    assert found.collectives == {"all-gather": {"count": 1, "bytes": 64 * 8 * 2}}
    assert found.hbm_bytes == 64 * 8 * 2 + 2 * 3 * 4  # what is gathered, and what the other fusion reads and writes


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("HloModule empty\n")


def test_a_real_program_of_this_cpu_is_read():
    def function(x):
        return jax.lax.scan(lambda y, _: (jnp.tanh(y @ y), None), x, None, length=5)[0]

    text = jax.jit(function).lower(jax.ShapeDtypeStruct((16, 16), jnp.float32)).compile().as_text()
    module = hlo.parse(text)
    assert loops(module).popitem()[1] == 5
    assert estimate(text).hbm_bytes >= 5 * 3 * 16 * 16 * 4
