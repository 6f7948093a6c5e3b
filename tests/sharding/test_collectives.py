"""Bytes that devices send, counted in hand-written programs."""

import jax
import jax.numpy as jnp
import pytest

from lepton_xla.sharding.collectives import Collective, find_collectives, sent_by_kind


def module(*lines, computations=""):
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m, num_partitions=16\n\n{computations}\nENTRY %main.1 (x: f32[8,4]) -> f32[8,4] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("line", "found", "sent"),
    [
        # f32[8,4] is 128 bytes. Each of n devices sends (n - 1) of n parts, and twice that for an all-reduce.
        ("%a = f32[8,4]{1,0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add", ("all-reduce", 128, 4), 192),
        ("%a = f32[8,4]{1,0} all-gather(%x), replica_groups=[4,4]<=[16], dimensions={0}", ("all-gather", 128, 4), 96),
        # It makes an eighth of what it takes.
        (
            "%a = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} reduce-scatter(%x), replica_groups=[2,8]<=[8,2]T(1,0)",
            ("reduce-scatter", 512, 8),
            448,
        ),
        ("%a = s8[8,4]{1,0} all-to-all(%x), replica_groups={{0,1}}, dimensions={0}", ("all-to-all", 32, 2), 16),
        (
            "%a = f32[8,4]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}",
            ("collective-permute", 128, 2),
            128,
        ),
        # No groups: all partitions. A tuple: several arrays at once; a layout is no part of a shape.
        (
            "%a = (f32[8,4]{1,0:T(8,128)}, pred[3]{0}, /*index=2*/s4[5]{0}) all-reduce(%x, %y, %z), replica_groups={}",
            ("all-reduce", 128 + 3 + 3, 16),
            251,
        ),
        ("%a = f32[] all-reduce(%x), replica_groups=mesh['a'=4,'b'=2,'c'=2] {'a','c'}", ("all-reduce", 4, 8), 7),
        ("%a = f32[8,4]{1,0} all-reduce(%x), replica_groups=@mesh['a'=16] {'a':(1)2}", ("all-reduce", 128, 2), 128),
        ("%a = f8e4m3fn[16]{0} all-gather(%x), replica_groups=[1,16]<=[16]", ("all-gather", 16, 16), 15),
    ],
)
def test_one_operation(line, found, sent):
    (collective,) = find_collectives(module(f"ROOT {line}"))
    assert collective == Collective(*found)
    assert collective.sent_bytes == sent


def test_one_device_sends_nothing():
    assert [Collective(kind, 100, 1).sent_bytes for kind in ("all-reduce", "all-gather", "collective-permute")] == [
        0
    ] * 3


def test_a_start_and_its_end_are_one_operation_of_the_ends_bytes():
    text = module(
        "%s = ((f32[4,4]{1,0}), f32[8,4]{1,0}) all-gather-start(%x), replica_groups=[8,2]<=[16], dimensions={0}",
        "%r = ((f32[8,4]{1,0}), f32[8,4]{1,0}) all-reduce-start(%x), replica_groups=[8,2]<=[16], to_apply=%add",
        "%d = f32[8,4]{1,0} all-gather-done(%s)",
        "ROOT %e = f32[8,4]{1,0} all-reduce-done(%r)",
    )
    assert find_collectives(text) == [Collective("all-gather", 128, 2), Collective("all-reduce", 128, 2)]


ASYNC = """
%wrapped (p: f32[8,4]) -> f32[4,4] {
  ROOT %r = f32[4,4]{1,0} reduce-scatter(%p), channel_id=3, replica_groups=[8,2]<=[16], dimensions={0}, to_apply=%add
}
"""


def test_an_asynchronous_call_counts_where_it_starts():
    text = module(
        "%s = ((f32[8,4]{1,0}), f32[4,4]{1,0}, u32[]) async-start(%x), calls=%wrapped",
        "%u = ((f32[8,4]{1,0}), f32[4,4]{1,0}, u32[]) async-update(%s), calls=%wrapped",
        "ROOT %d = f32[4,4]{1,0} async-done(%u), calls=%wrapped",
        computations=ASYNC,
    )
    assert find_collectives(text) == [Collective("reduce-scatter", 128, 2)]


def fused(name, *lines):
    body = "\n".join(f"  {line}" for line in lines)
    return f"%{name} (p.1: f32[4,4]) -> f32[8,4] {{\n{body}\n}}\n"


GATHER = "%g = f32[8,4]{1,0} all-gather(%p), channel_id=7, replica_groups=[8,2]<=[16], dimensions={0}"


def test_the_fusions_that_share_an_asynchronous_operation_are_one():
    """TPU's compiler writes the operation into the fusion that starts it, each that it overlaps with, and the last."""
    text = module(
        "%s = (f32[8,4]{1,0}) fusion(%x), kind=kCustom, calls=%begin",
        "%m = (f32[8,4]{1,0}) fusion(%s), kind=kCustom, calls=%between",
        "ROOT %d = f32[8,4]{1,0} fusion(%m), kind=kCustom, calls=%end",
        computations="".join(fused(name, GATHER) for name in ("begin", "between", "end")),
    )
    assert find_collectives(text) == [Collective("all-gather", 128, 2)]


def test_operations_that_are_not_fused_may_share_a_channel():
    assert len(find_collectives(module(GATHER, GATHER.replace("%g", "%h")))) == 2


def test_an_all_reduce_merged_with_the_cut_of_its_result_is_a_reduce_scatter():
    text = module(
        "ROOT %d = f32[2,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter",
        computations=fused(
            "all-reduce-scatter",
            "%r = f32[8,4]{1,0} all-reduce(%p), channel_id=1, replica_groups=[4,4]<=[16], to_apply=%add",
            "ROOT %c = f32[2,4]{1,0} dynamic-slice(%r, %i, %z), dynamic_slice_sizes={2,4}",
        ),
    )
    assert find_collectives(text) == [Collective("reduce-scatter", 128, 4)]


LOOP = """
%inner (p.1: f32[8,4]) -> f32[8,4] {
  ROOT %r = f32[8,4]{1,0} all-reduce(%p.1), channel_id=1, replica_groups=[8,2]<=[16], to_apply=%add
}

%outer (p.2: f32[8,4]) -> f32[8,4] {
  %w = f32[8,4]{1,0} while(%p.2), condition=%cond, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %g = f32[8,4]{1,0} all-gather(%w), replica_groups=[8,2]<=[16], dimensions={0}
}

%cond (p.3: f32[8,4]) -> pred[] {
  ROOT %t = pred[] constant(true)
}
"""


def test_loops_multiply():
    line = (
        'ROOT %w = f32[8,4]{1,0} while(%x), condition=%cond, body=%outer, backend_config={"known_trip_count":{"n":"5"}}'
    )
    found = find_collectives(module(line, computations=LOOP))
    assert found == [Collective("all-reduce", 128, 2, runs=15), Collective("all-gather", 128, 2, runs=5)]
    assert sent_by_kind(found) == {"all-gather": 5 * 64, "all-reduce": 15 * 128}


def test_the_branch_that_sends_most_counts():
    text = module(
        "ROOT %c = f32[8,4]{1,0} conditional(%i, %x, %x, %x), branch_computations={%small, %large, %none}",
        computations=fused("small", GATHER)
        + fused("large", GATHER.replace("[8,4]", "[80,4]"))
        + fused("none", "ROOT %p = f32[8,4]{1,0} parameter(0)"),
    )
    assert find_collectives(text) == [Collective("all-gather", 1280, 2)]


def test_what_xla_writes():
    """On two devices: an all-reduce of a product whose contracted dimension is cut."""
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))  # noqa: E731
    x = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=cut(None, "a"))
    w = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=cut("a"))

    once = jax.jit(lambda x, w: x @ w, out_shardings=cut()).lower(x, w).compile().as_text()
    assert find_collectives(once) == [Collective("all-reduce", 4 * 6 * 4, 2)]
    assert sent_by_kind(find_collectives(once)) == {"all-reduce": 96}
