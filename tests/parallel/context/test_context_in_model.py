"""Context parallelism where it is used: in a rematerialized scan over layers, a whole model, and a pipeline."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from training_cases import MODELS, initial_params, ragged_batch

from ml.models import SelfAttention, Transformer, head_params, logical_axes
from ml.models.attention import AttentionLayer
from ml.parallel import MeshConfig, Rules
from ml.parallel.context import RingAttention, UlyssesAttention, sequence_order
from ml.train.loss import chunked_loss
from pallas_kernels.flash_attention import flash_attention

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROWS, LENGTH = 4, 32


def loss_and_gradient(name, mesh, order, make_strategy, remat):
    """A whole model's loss on packed rows whose columns are in ``order``."""
    config = dataclasses.replace(MODELS[name], max_length=LENGTH)
    rules = Rules.make(mesh, jax.devices()[: math.prod(mesh.degrees.values())])
    model, start = Transformer(config, place=rules.spec, remat=remat), initial_params(config)
    columns = sequence_order(LENGTH, mesh.sequence, order)

    def loss(params, batch):
        strategy = make_strategy(batch["segment_ids"], rules.spec)
        hidden, _, _ = model.apply({"params": params}, batch["tokens"], strategy, batch["positions"])
        logits_of = lambda head, hidden: model.apply({"params": head}, hidden, method="logits")  # noqa: E731
        head, targets, mask = head_params(config, params), batch["targets"], batch["loss_mask"]
        return chunked_loss(logits_of, head, hidden, targets, mask, 0.01, 8)[0]

    with jax.set_mesh(rules.mesh):
        batch = ragged_batch(ROWS, LENGTH)
        batch = {key: jax.device_put(x[:, columns], rules.sharding("batch", "length")) for key, x in batch.items()}
        params = jax.device_put(start, rules.shardings(logical_axes(config), start))
        return jax.device_get(jax.jit(jax.value_and_grad(loss))(params, batch))


@functools.cache
def on_one_device(name):
    attend = lambda segments, place: SelfAttention(segments)  # noqa: E731
    return loss_and_gradient(name, MeshConfig(1), "contiguous", attend, "none")


@pytest.mark.sweep("mixed")
@pytest.mark.parametrize(
    ("name", "mesh", "strategy", "order"),
    [
        ("gemma", MeshConfig(1, sequence=8), RingAttention, "zigzag"),
        ("gpt2", MeshConfig(1, fsdp=2, tensor=2, sequence=2), RingAttention, "zigzag"),
        ("dense", MeshConfig(1, sequence=2, fsdp=4, layout="zero3"), UlyssesAttention, "zigzag"),
        ("dense", MeshConfig(1, sequence=4, tensor=2, sequence_residual=True), RingAttention, "contiguous"),
    ],
    ids=["ring8", "mixed", "ulysses", "sequence_residual"],
)
def test_a_model_has_the_gradient_of_one_device(name, mesh, strategy, order):
    make = lambda segments, place: strategy(segments, place, order)  # noqa: E731
    loss, gradient = loss_and_gradient(name, mesh, order, make, "full")
    wanted_loss, wanted = on_one_device(name)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted))

    def close(a, b):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(b).max(), 1e-2 * largest))

    jax.tree.map(close, gradient, wanted)


@pytest.mark.sweep("None-RingAttention", "None-UlyssesAttention")
@pytest.mark.parametrize("strategy", [RingAttention, UlyssesAttention])
@pytest.mark.parametrize("policy", [None, "nothing_saveable", "checkpoint_dots"])
def test_inside_a_pipeline_of_scanned_layers(strategy, policy):
    """Two stages of three layers, each of whose windows is traced; the gradient is taken outside and inside the map."""
    length, heads, width = 16, 4, 4
    rules = Rules.make(MeshConfig(1, stage=2, sequence=4))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 2, length, heads, width)).astype(np.float32)  # [stage, batch, ...]
    segments = np.sort(rng.integers(1, 3, (2, length)), axis=1).astype(np.int32)
    windows = np.array([3, 1000, 6], np.int32)

    def layers(attend, x):
        def body(x, window):
            return x + attend(x, x[:, :, :2], jnp.sin(x[:, :, 2:]), window), None

        if policy is not None:
            body = jax.checkpoint(body, policy=getattr(jax.checkpoint_policies, policy), prevent_cse=False)
        return jax.lax.scan(body, x, windows)[0]

    def on_one(x):
        options = {"segment_ids": segments, "scale": 0.5, "implementation": "reference"}
        attend = lambda q, k, v, window: flash_attention(q, k, v, window=window, **options)  # noqa: E731
        return sum(jnp.square(layers(attend, x[stage])).sum() for stage in range(2))

    def stage_loss(x, segments):
        def attend(q, k, v, window):
            layer = AttentionLayer(0, window, 0.5, None)
            return strategy(segments, rules.spec).attend(layer, q, k, v, None)[0]

        return jnp.square(layers(attend, x[0])).sum()[None]

    def staged(function, out_specs):
        specs = (PartitionSpec("stage"), PartitionSpec())
        return jax.shard_map(function, in_specs=specs, out_specs=out_specs, axis_names={"stage"})

    def outside(x, segments):
        return staged(stage_loss, PartitionSpec("stage"))(x, segments).sum()

    def inside(x, segments):
        loss, pullback = jax.vjp(lambda x: stage_loss(x, segments), x)
        return pullback(jnp.ones_like(loss))[0]

    columns = sequence_order(length, 4, "zigzag")
    with jax.set_mesh(rules.mesh):
        place = jax.NamedSharding(
            rules.mesh, PartitionSpec("stage", *rules.spec("batch", "length", "heads", "head_dim"))
        )
        args = (
            jax.device_put(x[:, :, columns], place),
            jax.device_put(segments[:, columns], rules.sharding("batch", "length")),
        )
        results = jax.jit(jax.grad(outside))(*args), jax.jit(staged(inside, PartitionSpec("stage")))(*args)
    expected = jax.jit(jax.grad(on_one))(x)[:, :, columns]
    for result in results:
        np.testing.assert_allclose(result, expected, atol=1e-5 * np.abs(expected).max())
