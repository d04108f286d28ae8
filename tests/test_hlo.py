"""What is read out of the text of a compiled program, on short texts in the forms that the compilers write."""

import pytest

from maxlm import hlo

MESH = {"data": 2, "expert": 2}
OVER_EXPERT, OVER_DATA = "{{0,1},{2,3}}", "{{0,2},{1,3}}"


def program(*lines: str, others: str = "") -> str:
    """A module whose ENTRY computation has these lines."""
    return "\n".join(["HloModule jit_f", others, "ENTRY %main (p: f32[4]) -> f32[4] {", *lines, "}"])


def loop(*lines: str, trips: int = 3) -> tuple[str, str]:
    """A loop over these lines: its operation, and the computations of its body and condition."""
    condition = ["%condition (c: s32[]) -> pred[] {", f"  %n = s32[] constant({trips})", "}"]
    run = "  %loop = (s32[]) while(%start), condition=%condition, body=%body"
    return run, "\n".join(["%body (b: (s32[])) -> (s32[]) {", *lines, "}", *condition])


def found(text: str) -> list[tuple]:
    return [(c.kind, c.dtype, c.shape, c.bytes, c.times, set(c.axes(MESH))) for c in hlo.collectives(text)]


def test_a_ragged_exchange_counts_with_its_smaller_side_in_either_direction():
    there = "  %there = bf16[12,2,8]{2,1,0:T(2,128)S(1)} ragged-all-to-all(%tokens, %room, %a, %b, %c, /*index=5*/%d), "
    back = "  %back = bf16[3,2,8]{2,1,0} ragged-all-to-all(%rows, %others, %a, %b, %c, %d), "
    groups = f"channel_id=1, replica_groups={OVER_EXPERT}"
    text = program(
        "  %tokens = bf16[3,2,8]{2,1,0} parameter(0)",
        there + groups,
        "  %rows = bf16[12,2,8]{2,1,0} fusion(%there), kind=kLoop, calls=%mlp",
        back + groups,
    )
    assert found(text) == [("ragged-all-to-all", "bf16", (3, 2, 8), 96, 1, {"expert"})] * 2


def test_each_array_of_a_combined_collective_counts():
    text = program(
        "  %sums = (f32[8,4]{1,0:T(8,128)}, f32[6]{0}, /*index=2*/bf16[]{:T(128)}) all-reduce(%a, %b, /*index=2*/%c), "
        f"channel_id=7, replica_groups={OVER_DATA}, to_apply=%add",
    )
    shapes = [("f32", (8, 4), 128), ("f32", (6,), 24), ("bf16", (), 2)]
    assert found(text) == [("all-reduce", *shape, 1, {"data"}) for shape in shapes]


def test_a_collective_that_is_started_counts_with_its_whole_arrays():
    text = program(
        "  %gather = ((f32[2]{0}, f32[3]{0}), (f32[4]{0}, f32[6]{0})) all-gather-start(%a, %b), "
        f"replica_groups={OVER_DATA}, dimensions={{0}}",
        "  %done = (f32[4]{0}, f32[6]{0}) all-gather-done(%gather)",
        "  %permute = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%c), "
        "source_target_pairs={{0,1},{1,0},{2,3},{3,2}}",
        "  %scatter = f32[2]{0} reduce-scatter(f32[4]{0} %d), replica_groups={{0,1},{2,3}}, to_apply=%add",
    )
    assert found(text) == [
        ("all-gather", "f32", (4,), 16, 1, {"data"}),
        ("all-gather", "f32", (6,), 24, 1, {"data"}),
        ("collective-permute", "f32", (5,), 20, 1, {"expert"}),
        ("reduce-scatter", "f32", (4,), 16, 1, {"expert"}),
    ]


def test_collectives_in_loops_count_once_per_trip():
    run, body = loop(f"  %sum = f32[8]{{0}} all-reduce(%a), replica_groups={OVER_DATA}, to_apply=%add", trips=5)
    assert found(program(run, others=body)) == [("all-reduce", "f32", (8,), 32, 5, {"data"})]


def test_a_collective_that_runs_beside_a_loop_counts_once():
    """The TPU compiler starts it in a fusion, goes on with it in others within the loop, and ends it after the loop."""
    marks = 'frontend_attributes={chain_id="0"}, metadata={op_name="jit(f)/all_gather"}'
    gather = f"all-gather(%p), channel_id=1, replica_groups={OVER_DATA}, dimensions={{0}}, {marks}"
    step = "  %%%s = f32[8]{0} fusion(%%p), kind=kCustom, calls=%%%s_fused"
    run, body = loop(step % ("going", "going"))
    layouts = {"start": "{0}", "going": "{0:S(1)}", "done": "{0}"}
    fused = [
        "\n".join([f"%{name}_fused (p: f32[4]) -> f32[8] {{", f"  %gather = f32[8]{layout} {gather}", "}"])
        for name, layout in layouts.items()
    ]
    text = program(step % ("start", "start"), run, step % ("done", "done"), others="\n".join([*fused, body]))
    assert found(text) == [("all-gather", "f32", (8,), 32, 1, {"data"})]


def test_two_loops_have_collectives_of_their_own():
    run, body = loop(f"  %sum = f32[8]{{0}} all-reduce(%a), replica_groups={OVER_DATA}, to_apply=%add")
    again = body.replace("body", "other").replace("condition", "limit").replace("%sum", "%more")
    other = "  %then = (s32[]) while(%loop), condition=%limit, body=%other"
    assert len(found(program(run, other, others=body + "\n" + again))) == 2


@pytest.mark.parametrize(
    "groups",
    [
        OVER_DATA,
        "[2,2]<=[2,2]T(1,0)",
        "mesh['a'=2,'b'=2] {'a'}",
        "mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}",
    ],
)
def test_groups_are_read_in_each_form(groups):
    line = f"  %sum = f32[8]{{0}} all-reduce(%a), channel_id=1, replica_groups={groups}, to_apply=%add"
    (sum_,) = hlo.collectives(program(line))
    assert sum_.axes(MESH) == {"data"}


def test_all_devices_meet_where_no_group_is_named():
    (sum_,) = hlo.collectives(program("  %sum = f32[8]{0} all-reduce(%a), replica_groups={}, to_apply=%add"))
    assert sum_.axes(MESH) == {"data", "expert"}


@pytest.mark.parametrize("text", ["", "HloModule jit_f"])
def test_what_is_no_program_is_refused(text):
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.collectives(text)
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.matmul_flops(text)


def test_operations_are_priced_through_loops_and_kernels_are_not_priced():
    price = 'backend_config={"window_config":{"estimated_cycles":"70"}}'
    run, others = loop(
        f'  %product = f32[4]{{0}} fusion(%a), calls=%f, metadata={{op_name="layer/mlp"}}, {price}', trips=5
    )
    kernel = [
        '  %kernel = f32[4]{0} custom-call(%b), custom_call_target="tpu_custom_call", frontend_attributes={',
        '"says": {"block": 512}',
        '}}, metadata={op_name="layer/attention"}',
    ]
    text = program(run, *kernel, f"  %last = f32[4]{{0}} fusion(%c), calls=%g, {price}", others=others)
    assert hlo.operations(text) == [
        hlo.Operation("product", "layer/mlp", 70, 5),
        hlo.Operation("kernel", "layer/attention", None, 1),
        hlo.Operation("last", "", 70, 1),
    ]
    unknown = 'backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}'
    text = program(f"  %last = f32[4]{{0}} fusion(%c), calls=%g, {unknown}")
    assert hlo.operations(text) == [hlo.Operation("last", "", 0, 1)], "the compiler's word for what it does not know"
