"""Collectives read off compiled programs: hand-written text of known numbers, and real programs on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ml.plan.collectives import by_axes, collectives
from ml.plan.hlo import Module

MESH = {"data": 2, "tensor": 4}


def program(*lines: str) -> str:
    """A module whose entry holds ``lines``."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def only(text: str, mesh=MESH):
    (one,) = collectives(text, mesh)
    return one


@pytest.mark.parametrize(
    ("groups", "axes", "group"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("tensor",), 4),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("replica_groups={}", ("data", "tensor"), 8),
        ("replica_groups=[2,4]<=[8]", ("tensor",), 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("replica_groups=[1,8]<=[8]", ("data", "tensor"), 8),
        ("replica_groups=mesh['x'=2,'y'=4] {'y'}", ("tensor",), 4),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", ("data",), 2),
        ("replica_groups=mesh['x'=8] {'x'}", ("data", "tensor"), 8),
        ("replica_groups=mesh['x'=8] {'x':(2)4}", ("tensor",), 4),
        ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", ("data",), 2),
        ("replica_groups=mesh['x'=4,'y'=2], device_ids=(0,4,1,5,2,6,3,7) {'y'}", ("data",), 2),
    ],
)
def test_every_way_to_write_groups(groups, axes, group):
    found = only(
        program(f"%a = bf16[128,64]{{1,0:T(8,128)(2,1)}} all-reduce(%p), channel_id=1, {groups}, to_apply=%add")
    )
    assert (found.kind, found.axes, found.group) == ("all-reduce", axes, group)
    assert found.bytes == 2 * (group - 1) / group * 128 * 64 * 2


TENSOR = "replica_groups=[2,4]<=[8]"


def test_a_sum_fused_with_the_slice_that_is_kept_of_it_is_a_reduce_scatter():
    text = f"""HloModule m

%all-reduce-scatter.3.clone (input: f32[64,8]) -> f32[16,8] {{
  %input = f32[64,8] parameter(0)
  %all = f32[64,8] all-reduce(%input), channel_id=1, {TENSOR}, to_apply=%add
  ROOT %kept = f32[16,8] dynamic-slice(%all, %i, %zero), dynamic_slice_sizes={{16,8}}
}}

ENTRY %main (p: f32[64,8]) -> f32[16,8] {{
  %p = f32[64,8] parameter(0)
  ROOT %fusion = f32[16,8] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3.clone
}}
"""
    found = only(text)
    assert (found.kind, found.axes, found.bytes) == ("reduce-scatter", ("tensor",), 64 * 8 * 4 * 3 / 4)


@pytest.mark.parametrize(
    ("line", "size"),
    [
        (f"%a = f32[64] all-gather(%p), {TENSOR}, dimensions={{0}}", 64 * 4 * 3 / 4),
        (f"%a = (f32[16], f32[64]) all-gather-start(%p), {TENSOR}, dimensions={{0}}", 64 * 4 * 3 / 4),
        (f"%a = ((f32[16], s8[4]), (f32[64], s8[16])) all-gather-start(%p, %q), {TENSOR}", (64 * 4 + 16) * 3 / 4),
        (f"%a = f32[16] reduce-scatter(%p), {TENSOR}, to_apply=%add", 64 * 4 * 3 / 4),
        (f"%a = (f32[16], /*index=1*/bf16[2,3]{{1,0}}) all-reduce(%p, %q), {TENSOR}", (64 + 12) * 2 * 3 / 4),
        (f"%a = (f32[8,2], f32[8,2]) all-to-all(%p, %q), {TENSOR}", 2 * 16 * 4 * 3 / 4),
        (f"%a = f32[100] ragged-all-to-all(%p, %q), {TENSOR}", 400 * 3 / 4),
        ("%a = f32[25] collective-permute(%p), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", 100),
        ("%a = (f32[25], f32[25], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}", 100),
        ("%a = pred[9] collective-permute(%p), source_target_pairs={{4,5},{5,6}}", 9),
        ("%a = s4[9] all-gather(%p), replica_groups=[2,4]<=[8]", 5 * 3 / 4),
    ],
)
def test_bytes_on_the_wire(line, size):
    found = only(program(line))
    assert found.total == size and found.axes == ("tensor",)


def test_what_stays_on_a_device_is_no_traffic():
    text = program(
        "%a = f32[9] all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}",
        "%b = f32[9] collective-permute(%p), source_target_pairs={{0,0},{1,1}}",
        "%c = f32[9] add(%a, %b)",
    )
    assert collectives(text, MESH) == []


LOOPS = """HloModule m

%piece.1 (p: f32[16]) -> f32[64] {
  ROOT %g.1 = f32[64]{0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%piece.2 (p: f32[16]) -> f32[64] {
  ROOT %g.2 = f32[64]{0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%scattered (p: f32[64]) -> f32[16] {
  ROOT %s.1 = f32[16]{0} reduce-scatter(%p), channel_id=8, replica_groups=[2,4]<=[8], to_apply=%add
}

%inner_body (t: (s32[], f32[16])) -> (s32[], f32[16]) {
  %start = (f32[16], f32[64]) fusion(%x), kind=kCustom, calls=%piece.1
  ROOT %done = f32[64]{0} fusion(%start), kind=kCustom, calls=%piece.2
}

%inner_condition (t: (s32[], f32[16])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%outer_body (t: (s32[], f32[16])) -> (s32[], f32[16]) {
  %once = f32[16]{0} all-reduce(%x), channel_id=9, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  ROOT %loop = (s32[], f32[16]{0:T(8)}) while(%t), condition=%inner_condition, body=%inner_body
}

%outer_condition (t: (s32[], f32[16])) -> pred[] {
  ROOT %unknown = pred[] parameter(0)
}

ENTRY %main (p: f32[16]) -> f32[16] {
  %s = ((f32[64]), f32[16], s32[]) async-start(%p), calls=%scattered
  %u = ((f32[64]), f32[16], s32[]) async-update(%s), calls=%scattered
  %d = f32[16]{0} async-done(%u), calls=%scattered
  ROOT %w = (s32[], f32[16]) while(%p), condition=%outer_condition, body=%outer_body, KNOWN
}
""".replace("KNOWN", 'backend_config={"known_trip_count":{"n":"5"}}')


def test_loops_multiply_and_pieces_of_one_operation_count_once():
    assert len(collectives(LOOPS, MESH)) == 3
    found = {(one.kind, one.axes): one for one in collectives(LOOPS, MESH)}
    assert {key: one.times for key, one in found.items()} == {
        ("all-gather", ("tensor",)): 15,
        ("all-reduce", ("data",)): 5,
        ("reduce-scatter", ("tensor",)): 1,
    }
    assert found["all-gather", ("tensor",)].total == 15 * 64 * 4 * 3 / 4
    assert by_axes(found.values())["all-reduce", ("data",)] == (5 * 64, 5)


@pytest.mark.parametrize(
    ("condition", "turns"),
    [
        ("  %c = s32[] constant(6)\n  ROOT %lt = pred[] compare(%i, %c), direction=LT", 6),
        ("  %c = s32[] constant(6)\n  ROOT %lt = pred[] compare(%i, %c), direction=LE", 7),
        ("  %c = s32[] constant(6)\n  ROOT %lt = pred[] compare(%i, %c), direction=GT", 1),
        ("  %c = s32[] constant(6)\n  %d = s32[] constant(8)\n  ROOT %lt = pred[] compare(%i, %c), direction=LT", 1),
    ],
)
def test_a_loop_without_a_note_turns_up_to_its_bound(condition, turns):
    text = f"%c (t: s32[]) -> pred[] {{\n{condition}\n}}\n\n" + program("%w = s32[] while(%p), condition=%c, body=%b")
    module = Module(text)
    assert module.trip_count(module.computations["main"][0]) == turns


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)


def compiled(mesh, function, *arguments) -> str:
    """Text of ``function``, compiled for float32 arrays of (shape, placement)."""
    shapes = [
        jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*p))) for s, p in arguments
    ]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*shapes).compile().as_text()


def test_real_gathers_in_a_scan(mesh):
    def run(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ jax.reshard(w, PartitionSpec(None, None))), None

        return jax.lax.scan(layer, x, weights)[0]

    text = compiled(mesh, run, ((5, 16, 16), (None, "tensor", None)), ((8, 16), ("data", None)))
    assert by_axes(collectives(text, mesh.shape)) == {("all-gather", ("tensor",)): (5 * 16 * 16 * 4 * 3 / 4, 5)}


def test_real_collectives_of_every_kind(mesh):
    def moved(x):
        swap = jax.lax.ppermute(x, "tensor", [(0, 1), (1, 2), (2, 3), (3, 0)])
        swapped = jax.lax.all_to_all(x, "data", 1, 0, tiled=True)
        reduced = jax.lax.psum_scatter(x, ("data", "tensor"), scatter_dimension=1, tiled=True)
        return swap.sum(), swapped.sum(), reduced.sum(), jax.lax.pmax(x, "data")

    specs = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec(), "check_vma": False}
    text = compiled(mesh, functools.partial(jax.shard_map, **specs)(moved), ((32, 32), (None, None)))
    everything = 32 * 32 * 4
    assert by_axes(collectives(text, mesh.shape)) == {
        ("collective-permute", ("tensor",)): (everything, 1),
        ("all-reduce", ("data",)): (everything, 1),
        ("reduce-scatter", ("data", "tensor")): (everything * 7 / 8, 1),
        ("all-to-all", ("data",)): (everything / 2, 1),
    }


def test_a_gradient_along_the_batch_is_reduced_over_it(mesh):
    def loss(w, x):
        return jnp.square(x @ w).sum()

    text = compiled(mesh, jax.grad(loss), ((16, 32), (None, "tensor")), ((8, 16), ("data", None)))
    assert by_axes(collectives(text, mesh.shape)) == {("all-reduce", ("data",)): (2 / 2 * 16 * 8 * 4, 1)}
    assert np.isclose(collectives(text, mesh.shape)[0].group, 2)


@pytest.mark.parametrize(("slices", "count"), [("1,2", 2), ("1:4", 4)])
def test_a_sum_over_slices_is_sent_by_their_hosts(slices, count):
    attributes = f'_xla_megascale_target="{{{slices}}}x{{0:3}}",_xla_megascale_transfer_type="ALL_REDUCE"'
    line = f"%s = (f32[64,8], u32[], token[]) send(%p, %t), channel_id=2, frontend_attributes={{{attributes}}}"
    (found,) = collectives(program(line, "%t = token[] after-all()"), MESH, across="stage")
    assert (found.kind, found.axes, found.group) == ("all-reduce", ("stage",), count)
    assert found.bytes == 2 * (count - 1) / count * 64 * 8 * 4
