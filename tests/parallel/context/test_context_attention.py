"""Ring and Ulysses attention on eight devices: values and gradients of the reference on one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml.errors import UserError
from ml.models.attention import AttentionLayer
from ml.parallel import MeshConfig, Rules
from ml.parallel.context import RingAttention, UlyssesAttention, ring, sequence_order
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention.xla import XlaConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")
BATCH, LENGTH, KV_HEADS, WIDTH, SCALE = 2, 64, 2, 8, 0.4
RING8, MIXED = MeshConfig(1, sequence=8), MeshConfig(1, fsdp=2, sequence=2, tensor=2)
# (window, traced, softcap, segments)
CASES = {
    "causal": (None, False, None, False),
    "window": (9, False, 1.5, True),
    "traced": (20, True, None, True),
    "global": (2**30, True, 2.0, False),
}


@functools.cache
def inputs(heads):
    rng = np.random.default_rng(0)
    counts = (heads, KV_HEADS, KV_HEADS, heads)
    q, k, v, w = (rng.normal(size=(BATCH, LENGTH, n, WIDTH)).astype(np.float32) for n in counts)
    return (2 * q, k, v, w), np.sort(rng.integers(1, 5, (BATCH, LENGTH)), axis=1).astype(np.int32)


@functools.cache
def expected(name, heads):
    window, _, softcap, packed = CASES[name]
    (q, k, v, w), segments = inputs(heads)

    def loss(q, k, v):
        options = {"segment_ids": segments if packed else None, "window": window, "softcap": softcap, "scale": SCALE}
        out = flash_attention(q, k, v, implementation="reference", **options)
        return (w * out).sum(), out

    gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return jax.device_get((out, *gradients))


def on_mesh(mesh, heads, order):
    """The rules, and (q, k, v, w, segments) with their columns in ``order``, on the mesh."""
    rules = Rules.make(mesh)
    columns = sequence_order(LENGTH, mesh.sequence, order)
    arrays, segments = inputs(heads)
    axes = [("batch", "length", axis, "head_dim") for axis in ("heads", "kv_heads", "kv_heads", "heads")]
    placed = [jax.device_put(x[:, columns], rules.sharding(*names)) for x, names in zip(arrays, axes, strict=True)]
    return rules, columns, [*placed, jax.device_put(segments[:, columns], rules.sharding("batch", "length"))]


def got(strategy, order, mesh, name, heads):
    """Output and gradients, with their columns in order again."""
    window, traced, softcap, packed = CASES[name]
    rules, columns, arrays = on_mesh(mesh, heads, order)

    def loss(q, k, v, w, segments, moving_window):
        layer = AttentionLayer(0, moving_window if traced else window, SCALE, softcap)
        out, state = strategy(segments if packed else None, rules.spec, order).attend(layer, q, k, v, "state")
        assert state == "state" and jax.typeof(out) == jax.typeof(q)
        return (w * out).sum(), out

    with jax.set_mesh(rules.mesh):
        gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays, jnp.int32(window or 0))
    return [np.asarray(x)[:, np.argsort(columns)] for x in (out, *gradients)]


def distance(results, wanted):
    """Greatest difference as a share of the signal's greatest value, over output and gradients."""
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(results, wanted, strict=True))


@pytest.mark.sweep("zigzag-ring8-window", "contiguous-mixed-global", "zigzag-mixed-traced")
@pytest.mark.parametrize(
    ("order", "mesh", "name"),
    [
        ("zigzag", RING8, "causal"),
        ("zigzag", RING8, "window"),
        ("zigzag", RING8, "traced"),
        ("contiguous", RING8, "causal"),
        ("contiguous", RING8, "window"),
        ("contiguous", RING8, "global"),
        ("zigzag", MIXED, "traced"),
        ("contiguous", MIXED, "global"),
    ],
    ids=lambda value: "mixed" if value is MIXED else "ring8" if value is RING8 else value,
)
def test_ring_equals_the_reference(order, mesh, name):
    assert distance(got(RingAttention, order, mesh, name, 4), expected(name, 4)) < 1e-5


@pytest.mark.sweep("zigzag-ring8-window", "contiguous-ring8-causal")
@pytest.mark.parametrize(
    ("order", "mesh", "name"),
    [
        ("zigzag", RING8, "window"),
        ("contiguous", RING8, "causal"),
        ("contiguous", RING8, "traced"),
        ("zigzag", MIXED, "global"),
        ("zigzag", MIXED, "traced"),
    ],
    ids=lambda value: "mixed" if value is MIXED else "ring8" if value is RING8 else value,
)
def test_ulysses_equals_the_reference(order, mesh, name):
    """Eight shards repeat each of two key/value heads four times; two shards of two find one head each."""
    assert distance(got(UlyssesAttention, order, mesh, name, 8), expected(name, 8)) < 1e-5


def test_many_small_blocks_in_a_ring(monkeypatch):
    monkeypatch.setattr(ring, "_tiles", lambda *_: XlaConfig(tile_q=3, tile_kv=2))
    assert distance(got(RingAttention, "zigzag", RING8, "window", 4), expected("window", 4)) < 1e-5
    monkeypatch.setattr(ring, "_tiles", lambda *_: XlaConfig(tile_q=5, tile_kv=7))
    assert distance(got(RingAttention, "zigzag", MIXED, "causal", 4), expected("causal", 4)) < 1e-5


def test_keys_that_do_not_move_are_noticed(monkeypatch):
    monkeypatch.setattr(ring._Ring, "shift", lambda self, x, hops=1: x)
    results, wanted = got(RingAttention, "contiguous", RING8, "causal", 4), expected("causal", 4)
    assert distance(results[:1], wanted[:1]) > 0.1
    assert distance(results[2:3], wanted[2:3]) > 0.1


def test_bfloat16_in_bfloat16_out():
    rules, _, arrays = on_mesh(RING8, 4, "zigzag")
    with jax.set_mesh(rules.mesh):
        rounded = [x.astype(jnp.bfloat16) for x in arrays[:3]]
        attend = lambda q, k, v: RingAttention(None, rules.spec).attend(layer, q, k, v, None)[0]  # noqa: E731
        layer = AttentionLayer(0, None, SCALE, None)
        out, pullback = jax.vjp(jax.jit(attend), *rounded)
        assert [x.dtype for x in (out, *pullback(out))] == [jnp.bfloat16] * 4
    wanted = expected("causal", 4)[0][:, sequence_order(LENGTH, 8, "zigzag")]
    assert np.sqrt(np.mean((np.float32(out) - wanted) ** 2)) < 0.01 * np.sqrt(np.mean(wanted**2))


@pytest.mark.parametrize("strategy", [RingAttention, UlyssesAttention])
def test_off_any_mesh(strategy):
    (q, k, v, _), _ = inputs(4)
    out, _ = strategy().attend(AttentionLayer(0, None, SCALE, None), *(x[:, :63] for x in (q, k, v)), None)
    assert distance([out], [expected("causal", 4)[0][:, :63]]) < 1e-5


def test_ulysses_moves_heads_by_all_to_all_and_gathers_no_keys():
    rules, _, arrays = on_mesh(RING8, 8, "contiguous")
    with jax.set_mesh(rules.mesh):
        strategy = UlyssesAttention(arrays[4], rules.spec, "contiguous")
        attend = lambda *x: strategy.attend(AttentionLayer(0, None, SCALE, None), *x, None)[0]  # noqa: E731
        text = jax.jit(attend).lower(*arrays[:3]).compile().as_text()
    assert len(re.findall(r" all-to-all\(", text)) == 4  # query, key, value, output
    assert all("s32" in line for line in text.splitlines() if " all-gather(" in line), "more than segment ids"


@pytest.mark.parametrize(
    ("heads", "sequence", "tensor", "message"),
    [
        (4, 8, 1, r"sequence=8 .* 4 query heads and 2 key/value heads .*choose config.mesh.sequence from \[1, 2, 4\]"),
        (4, 4, 2, r"sequence=4 .* 2 query heads and 1 key/value heads .*tensor=2; .*from \[1, 2\]"),
    ],
)
def test_ulysses_refuses_heads_that_do_not_divide(heads, sequence, tensor, message):
    rules, _, arrays = on_mesh(MeshConfig(sequence=sequence, tensor=tensor), heads, "zigzag")
    layer = AttentionLayer(0, None, SCALE, None)
    with jax.set_mesh(rules.mesh), pytest.raises(UserError, match=message):
        UlyssesAttention(None, rules.spec).attend(layer, *arrays[:3], None)


def test_refuses_a_length_that_does_not_divide():
    rules, _, arrays = on_mesh(RING8, 4, "zigzag")
    layer = AttentionLayer(0, None, SCALE, None)
    with jax.set_mesh(rules.mesh), pytest.raises(UserError, match="16 chunks"):
        RingAttention(None, rules.spec).attend(layer, *(x[:, :56] for x in map(np.asarray, arrays[:3])), None)
