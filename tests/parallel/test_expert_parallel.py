"""The mixture-of-experts layer on eight devices: the same numbers however tokens, experts and widths are spread."""

import dataclasses
import functools
import math
import re

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import PartitionSpec

from ml.errors import UserError
from ml.models import MoEConfig, Transformer, TransformerConfig, init_params, logical_axes
from ml.models.moe import MoE, check_experts
from ml.parallel import MeshConfig, Rules, make_mesh
from ml.weights import ragged_dot

pytestmark = pytest.mark.usefixtures("quick_compilation")
BATCH, LENGTH, EMBED, WIDE, EXPERTS = 8, 4, 16, 12, 8
MESHES = {
    "expert 8": {"expert": 8},
    "expert 4 fsdp 2": {"expert": 4, "fsdp": 2},
    "expert 4 tensor 2": {"expert": 4, "tensor": 2},
    "expert 2 data 2 fsdp 2": {"expert": 2, "data": 2, "fsdp": 2},
    "expert 2 sequence 2 tensor 2": {"expert": 2, "sequence": 2, "tensor": 2},
    "fsdp 2 sequence 2 tensor 2": {"fsdp": 2, "sequence": 2, "tensor": 2},
}


def config(top_k=2, **options):
    moe = MoEConfig(EXPERTS, top_k, WIDE, **options)
    return TransformerConfig(
        vocab_size=8, num_layers=1, embed_dim=EMBED, num_heads=1, num_kv_heads=1, head_dim=4, mlp_dim=4, moe=moe
    )


def rules_of(degrees):
    degrees = {"data": 1} | degrees
    return Rules(make_mesh(MeshConfig(**degrees), jax.devices()[: math.prod(degrees.values())]))


def case(routing, model):
    """Parameters and inputs; ``one``: all tokens want expert 5 first, and most experts get none."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), meta.unbox(abstract(model)))
    x = rng.normal(size=(BATCH, LENGTH, EMBED)).astype(np.float32)
    if routing == "one":
        x = np.abs(x)
        params["router"]["kernel"][:] *= 0.01
        params["router"]["kernel"][:, 5] += 0.5
        params["router"]["kernel"][:, 2] += 0.2
    valid = rng.random((BATCH, LENGTH)) < 0.8
    weights = rng.normal(size=x.shape).astype(np.float32)
    return params, x, valid, weights


def abstract(model):
    return jax.eval_shape(lambda: MoE(model).init(jax.random.key(0), jnp.zeros((1, 1, EMBED))))["params"]


def axes_of(model):
    return jax.tree.map(lambda box: box.names, abstract(model), is_leaf=lambda x: isinstance(x, meta.AxisMetadata))


def objective(layer):
    def loss(params, x, valid, weights):
        out, stats = layer.apply({"params": params}, x, valid)
        return (weights * out).sum() + 3 * stats.balance, (out, stats)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@functools.cache
def on_one_device(routing, model):
    return jax.device_get(objective(MoE(model))(*case(routing, model)))


def placed_case(routing, model, rules):
    params, x, valid, weights = case(routing, model)
    params = jax.device_put(params, rules.shardings(axes_of(model), params))
    rows = rules.sharding("batch", "length", None)
    x, weights = jax.device_put((x, weights), rows)
    return params, x, jax.device_put(valid, rules.sharding("batch", "length")), weights


def check_same(model, degrees, run):
    """Compares a run on a mesh with the one device, for even and for extreme routing."""
    for routing in ("random", "one"):
        with jax.set_mesh(rules_of(degrees).mesh):
            ((got, (out, stats)), gradients) = jax.device_get(run(*placed_case(routing, model, rules_of(degrees))))
        ((wanted, (wanted_out, wanted_stats)), wanted_gradients) = on_one_device(routing, model)
        assert ((wanted_stats.counts == 0).sum() > 4) == (routing == "one")
        np.testing.assert_array_equal(stats.counts, wanted_stats.counts)
        np.testing.assert_allclose(stats.balance, wanted_stats.balance, rtol=1e-5)
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
        for a, b in zip(
            jax.tree.leaves((out, gradients)), jax.tree.leaves((wanted_out, wanted_gradients)), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
            assert np.abs(b).max() > 1e-3


@pytest.mark.sweep(
    "expert 8-2", "expert 4 tensor 2-1", "expert 2 sequence 2 tensor 2-2", "fsdp 2 sequence 2 tensor 2-1"
)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("mesh", MESHES)
def test_same_output_loss_and_gradients_on_every_mesh(mesh, top_k):
    model = config(top_k, normalize_top_k=top_k > 1)
    check_same(model, MESHES[mesh], objective(MoE(model, place=rules_of(MESHES[mesh]).spec)))


def emulated_ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """The primitive's documentation, written with gathers, for a machine that lacks it: exact, and all at once."""
    devices, me = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)

    def to_me(x):
        """What every device says about the slices that it sends here, ``[sender, slice]``."""
        return jax.lax.all_gather(x, axis_name).reshape(devices, devices, -1)[:, me]

    operands = jax.lax.all_gather(operand, axis_name)
    source, size, target = to_me(input_offsets), to_me(send_sizes), to_me(output_offsets)
    row = jnp.arange(len(output))[:, None, None]
    covers = (row >= target) & (row < target + size)  # [row, sender, slice]
    # What the receiver expects must be what is sent; and no row is written twice: either would be garbage here.
    agree = (recv_sizes.reshape(size.shape) == size).all() & (covers.sum(axis=(1, 2)) <= 1).all()
    sender = jnp.argmax(covers.any(axis=2), axis=1)
    index = jnp.where(covers, source + row - target, 0).sum(axis=(1, 2))
    result = jnp.where(covers.any(axis=(1, 2))[:, None], operands[sender, index], output)
    return jnp.where(agree, result, jnp.nan)


def test_the_emulation_reproduces_the_documentations_example():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    arguments = [[1, 2, 2], [3, 4, 0]], np.zeros((2, 4)), [[0, 1], [0, 1]], [[1, 2], [1, 1]], [[0, 0], [1, 2]]
    arguments = [np.array(x).reshape(2 * len(x[0])) for x in (*arguments, [[1, 1], [2, 1]])]
    arguments[:2] = [x.astype(np.float32)[:, None] for x in arguments[:2]]
    with jax.set_mesh(mesh):
        emulated = functools.partial(emulated_ragged_all_to_all, axis_name="x")
        run = jax.jit(jax.shard_map(emulated, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x")))
        result = run(*(jax.device_put(x, PartitionSpec("x")) for x in arguments))
    assert result.ravel().tolist() == [1, 3, 0, 0, 2, 2, 4, 0]


@pytest.mark.sweep("expert 2 sequence 2 tensor 2")
@pytest.mark.parametrize("mesh", ["expert 8", "expert 4 fsdp 2", "expert 2 sequence 2 tensor 2"])
def test_the_ragged_exchange_gives_the_same(mesh, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged_all_to_all)
    monkeypatch.setattr("ml.models.moe.exchange.choose_exchange", lambda moe, devices, platform: "ragged")
    model = config(top_k=3)
    run = objective(MoE(model, place=rules_of(MESHES[mesh]).spec))
    check_same(model, MESHES[mesh], run)


@jax.custom_vjp
def spoiled(x, exists):
    return jnp.where(exists[:, None], x, jnp.nan)


def leave_spoiled(exists, gradient):
    return jnp.where(exists[:, None], gradient, jnp.nan), None


spoiled.defvjp(lambda x, exists: (spoiled(x, exists), exists), leave_spoiled)


@pytest.mark.parametrize("exchange", ["gather", "ragged"])
def test_a_grouped_product_may_leave_garbage_in_rows_that_do_not_exist(exchange, monkeypatch):
    """As kernels on accelerators do, in results and in gradients; XLA's CPU expansion happens to write zeros."""

    def sloppy(x, sizes, w):
        exists = jnp.arange(len(x)) < sizes.sum()
        return spoiled(ragged_dot(spoiled(x, exists), sizes, w), exists)

    model, degrees = config(), {"expert": 4, "data": 2}
    for routing in ("random", "one"):
        on_one_device(routing, model)  # where all rows exist
    monkeypatch.setattr("ml.models.moe.layer.ragged_dot", sloppy)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged_all_to_all)
    monkeypatch.setattr("ml.models.moe.exchange.choose_exchange", lambda moe, devices, platform: exchange)
    check_same(model, degrees, objective(MoE(model, place=rules_of(degrees).spec)))


@flax.struct.dataclass
class Adapted:
    """A kernel and a low-rank change of it: three arrays with placements of their own."""

    base: jax.Array
    a: jax.Array
    b: jax.Array


@ragged_dot.register(Adapted)
def _(x, group_sizes, w):
    return ragged_dot(x, group_sizes, w.base) + ragged_dot(ragged_dot(x, group_sizes, w.a), group_sizes, w.b)


def test_a_leaf_of_several_arrays_is_read_as_each_is_placed():
    model, rules = config(), rules_of({"expert": 2, "fsdp": 2, "tensor": 2})
    params, *inputs = case("random", model)
    axes, rng = axes_of(model), np.random.default_rng(3)
    for name in ("gate", "up", "down"):
        kernel, (_, into, out) = params[name]["kernel"], axes[name]["kernel"]
        a, b = (rng.normal(size=(EXPERTS, *s)).astype(np.float32) for s in ((kernel.shape[1], 2), (2, kernel.shape[2])))
        params[name]["kernel"] = Adapted(kernel, a, b)
        axes[name]["kernel"] = Adapted(axes[name]["kernel"], ("expert", into, None), ("expert", None, out))
    (_, (wanted, _)), wanted_gradients = objective(MoE(model))(params, *inputs)
    with jax.set_mesh(rules.mesh):
        specs = jax.tree.map(lambda names: rules.sharding(*names), axes, is_leaf=lambda node: isinstance(node, tuple))
        params, inputs = jax.device_put(params, specs), placed_case("random", model, rules)[1:]
        (_, (out, _)), gradients = jax.device_get(objective(MoE(model, place=rules.spec))(params, *inputs))
    for a, b in zip(jax.tree.leaves((out, gradients)), jax.tree.leaves((wanted, wanted_gradients)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.sweep("ragged")
@pytest.mark.parametrize("exchange", ["gather", "ragged"])
def test_in_scanned_layers_that_are_computed_again(exchange, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged_all_to_all)
    monkeypatch.setattr("ml.models.moe.exchange.choose_exchange", lambda moe, devices, platform: exchange)
    model, rules = dataclasses.replace(config(), num_layers=2), rules_of({"expert": 4, "fsdp": 2})
    tokens = np.random.default_rng(0).integers(0, 8, (BATCH, LENGTH))

    def gradient(params, tokens, **options):
        def loss(params):
            hidden, _, stats = Transformer(model, **options).apply({"params": params}, tokens)
            return jnp.square(hidden - 1).sum() + 3 * stats.balance

        return jax.jit(jax.grad(loss))(params)

    params = jax.device_get(jax.jit(lambda: init_params(Transformer(model), jax.random.key(0)))())
    params = jax.tree.map(lambda w: 3 * w, params)
    wanted = gradient(params, tokens)
    with jax.set_mesh(rules.mesh):
        placed = jax.device_put(params, rules.shardings(logical_axes(model), params))
        tokens = jax.device_put(tokens, rules.sharding("batch", "length"))
        got = jax.device_get(gradient(placed, tokens, place=rules.spec, remat="full"))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_inside_a_pipeline_whose_stages_are_manual():
    """Two stages hold different layers; each must give what it gives alone."""
    model, degrees = config(), {"stage": 2, "expert": 2, "tensor": 2}
    rules = rules_of(degrees)
    params, x, valid, weights = case("random", model)
    stacked = jax.tree.map(lambda w: np.stack([w, -w]), params)
    axes = jax.tree.map(lambda names: ("layers", *names), axes_of(model), is_leaf=lambda x: isinstance(x, tuple))

    def stage(params, x, valid, weights):
        params = jax.tree.map(lambda w: w[0], params)
        (_, (out, stats)), gradients = objective(MoE(model, place=rules.spec))(params, x, valid, weights)
        return jax.tree.map(lambda a: a[None], (out, stats, gradients[0]))

    with jax.set_mesh(rules.mesh):
        stacked = jax.device_put(stacked, rules.shardings(axes, stacked))
        x, weights = jax.device_put((x, weights), rules.sharding("batch", "length", None))
        valid = jax.device_put(valid, rules.sharding("batch", "length"))
        # JAX cannot differentiate a shard_map inside one that tracks what varies: what is kept for the backward pass is
        # cut along the outer axis too, where the inner one cannot see it.
        stages = jax.shard_map(
            stage,
            in_specs=(PartitionSpec("stage"), PartitionSpec(), PartitionSpec(), PartitionSpec()),
            out_specs=PartitionSpec("stage"),
            axis_names={"stage"},
            check_vma=False,
        )
        got = jax.device_get(jax.jit(stages)(stacked, x, valid, weights))
    for index, sign in enumerate((1, -1)):
        same = jax.tree.map(lambda w, sign=sign: sign * w, params)
        (_, (out, stats)), gradients = objective(MoE(model))(same, *case("random", model)[1:])
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves((out, stats, gradients[0])), strict=True):
            np.testing.assert_allclose(a[index], b, atol=1e-5 * np.abs(b).max())


def compiled(degrees, model):
    rules = rules_of(degrees)
    with jax.set_mesh(rules.mesh):
        arguments = placed_case("random", model, rules)
        return arguments[0], objective(MoE(model, place=rules.spec)).lower(*arguments).compile()


@pytest.mark.parametrize("degree", [1, 2, 8])
def test_a_device_holds_and_reads_its_own_experts_only(degree):
    model = config()
    params, program = compiled({"expert": degree, "tensor": 8 // degree if degree > 1 else 1}, model)
    for name in ("gate", "up", "down"):
        kernel = params[name]["kernel"]
        assert kernel.addressable_shards[0].data.nbytes == kernel.nbytes // (8 if degree > 1 else 1)
    # The largest array that any device ever gathers is smaller than the experts of a layer.
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", program.as_text())
    sizes = [math.prod(map(int, shape.split(","))) for shape in gathered]
    assert bool(sizes) == (degree > 1)
    assert max(sizes, default=0) <= BATCH * LENGTH * EMBED < EXPERTS * EMBED * WIDE


def test_what_fsdp_cuts_is_gathered_for_the_devices_own_experts_and_its_gradient_scattered():
    _, program = compiled({"expert": 4, "fsdp": 2}, config())
    text = program.as_text()
    own = f"{EXPERTS // 4},{EMBED},{WIDE}"
    assert re.search(rf"= \w+\[{own}\]\S* all-gather", text)
    assert not re.search(rf"= \w+\[{EXPERTS},\d+,\d+\]\S* all-gather", text)
    assert re.search(rf"= \w+\[{EXPERTS // 4},{EMBED // 2},{WIDE}\]\S* reduce-scatter", text)
    assert not re.search(rf"= \w+\[{own}\]\S* all-reduce", text)


@pytest.mark.parametrize(
    ("model", "degree", "message"),
    [
        (config(), 3, "config.mesh.expert=3 does not divide config.model.moe.num_experts=8; choose one of 1, 2, 4, 8"),
        (dataclasses.replace(config(), moe=None), 2, "config.mesh.expert=2, but the model has no experts"),
    ],
)
def test_a_degree_that_does_not_fit_is_refused(model, degree, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_experts(model, {"data": 1, "expert": degree})
    check_experts(model, {"data": 8, "expert": 1})
    check_experts(config(), {"expert": 4})
