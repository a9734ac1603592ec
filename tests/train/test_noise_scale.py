"""The gradient's noise scale: against an analysis of variance in float64, a known answer, and any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr
from training_cases import MODELS, initial_params, ragged_batch

from ml.errors import UserError
from ml.models import Transformer, logical_axes
from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer
from ml.parallel import MeshConfig, Rules, place_batch
from ml.train import noise_scale
from ml.train.config import TrainConfig
from ml.train.objective import make_loss
from ml.train.state import init_state
from ml.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROWS = 16
ONE = MeshConfig(1, 1, 1)


def setting(mesh, microbatches, measure, model="tied"):
    """The mesh, the step (not jitted), its state and batch."""
    model, devices = MODELS[model], int(np.prod(list(mesh.degrees.values())))
    rules = Rules.make(mesh, jax.devices()[:devices])
    config = TrainConfig(batch_size=ROWS, microbatches=microbatches, noise_scale=measure)
    noise_scale.check_noise_scale(config, rules)
    axes = logical_axes(model)
    tx, rate = make_optimizer(
        OptimizerConfig("lamb", 0.1, clip_norm=0.5), ScheduleConfig(), total_steps=4, batch_size=ROWS, axes=axes
    )
    transformer, start = Transformer(model, place=rules.spec), initial_params(model)
    with jax.set_mesh(rules.mesh):
        params = jax.device_put(start, rules.shardings(axes, start))
        state = init_state(transformer, tx, rules, seed=0, ema=False, params=params)
        batch = place_batch(ragged_batch(ROWS), rules, microbatches)
    return rules.mesh, make_train_step(transformer, tx, rate, config, rules), state, batch


def one_step(mesh, microbatches):
    """Metrics of one step that measures."""
    mesh, step, state, batch = setting(mesh, microbatches, measure=True)
    with jax.set_mesh(mesh):
        _, metrics = jax.jit(step)(state, batch)
    return {name: float(x) for name, x in metrics.items() if not x.ndim}  # trust ratios have an entry for each layer


def program(mesh, microbatches, measure):
    """The step's operations as text, but for those that only the noise scale depends on; and the metrics' names."""
    mesh, step, state, batch = setting(mesh, microbatches, measure)
    with jax.set_mesh(mesh):
        closed, out = jax.make_jaxpr(step, return_shape=True)(state, batch)
    used = ["noise_" not in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(out)]
    text = str(dce_jaxpr(closed.jaxpr, used)[0])
    # How a scan's results are packed into Python's containers is no operation.
    return [line for line in text.splitlines() if not line.lstrip().startswith("ft_")], set(out[1])


def check_nothing_else_changes(mesh, microbatches):
    """Not the bits of compiled programs: which operations a compiler merges depends on all of them."""
    measuring, names = program(mesh, microbatches, True)
    plain, others = program(mesh, microbatches, False)
    assert measuring == plain and len(plain) > 500
    assert names - others == {"noise_variance", "noise_signal"}


@functools.cache
def row_gradients(model="tied"):
    """``path -> [rows, size]`` in float64: every row's own gradient, summed over its counted tokens; and the counts."""
    batch = ragged_batch(ROWS)
    loss = make_loss(Transformer(MODELS[model]), TrainConfig())
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    params = jax.tree.map(jnp.asarray, initial_params(MODELS[model]))
    rows = [gradient(params, jax.tree.map(lambda x, i=i: x[i : i + 1], batch))[0] for i in range(ROWS)]
    found = {}
    for row in rows:
        for path, leaf in jax.tree.leaves_with_path(row):
            found.setdefault(jax.tree_util.keystr(path), []).append(np.asarray(leaf, np.float64).ravel())
    return {path: np.stack(leaves) for path, leaves in found.items()}, batch["loss_mask"].sum(1)


def expected(parts_of):
    """tr(Sigma) and |G|^2 by a weighted one-way analysis of variance; ``parts_of(path)``: how many parts."""
    gradients, counts = row_gradients()
    variance = signal = 0.0
    for path, rows in gradients.items():
        parts = parts_of(path)
        if parts == 1:
            continue
        sums = rows.reshape(parts, ROWS // parts, -1).sum(1)
        n = counts.reshape(parts, -1).sum(1)
        mean = sums.sum(0) / n.sum()
        kept = n > 0
        deviations = sums[kept] / n[kept, None] - mean
        own = (n[kept, None] * deviations**2).sum() / (kept.sum() - 1)
        variance, signal = variance + own, signal + (mean**2).sum() - own / n.sum()
    return variance, signal


def check(metrics, parts_of):
    variance, signal = expected(parts_of)
    np.testing.assert_allclose(metrics["noise_variance"], variance, rtol=2e-4)
    # The difference of two numbers, either of which may be much larger.
    scale = abs(signal) + variance / row_gradients()[1].sum()
    np.testing.assert_allclose(metrics["noise_signal"], signal, atol=1e-3 * scale)


@pytest.mark.slow
def test_microbatches_of_unequal_counts_on_one_device_and_an_unchanged_update():
    counts = row_gradients()[1].reshape(4, -1).sum(1)
    assert counts.max() > 2 * counts.min()
    check(one_step(ONE, 4), lambda path: 4)
    check_nothing_else_changes(ONE, 4)


def partial(path):
    return path.endswith(("['kernel']", "['embedding']"))


MESHES = {
    # Kernels and tables: a part on each of the devices along these axes, in every microbatch. Others: a microbatch.
    "one_microbatch": (MeshConfig(4, 1, 2, layout="ddp"), 1, 4),
    "hybrid": (MeshConfig(2, 2, 2), 2, 2),
    "zero1": (MeshConfig(2, 4, 1, layout="zero1"), 2, 8),
    "zero2": (MeshConfig(2, 2, 2, layout="zero2"), 2, 1),
    "zero3": (MeshConfig(2, 4, 1, layout="zero3"), 2, 1),
    "sequence": (MeshConfig(2, 1, 2, sequence=2, layout="ddp"), 2, 2),
}


@pytest.mark.parametrize(
    "name",
    [
        "one_microbatch",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("hybrid", "zero1", "zero2", "zero3", "sequence")),
    ],
)
def test_parts_on_eight_devices(name):
    mesh, microbatches, shards = MESHES[name]
    check(one_step(mesh, microbatches), lambda path: microbatches * (shards if partial(path) else 1))
    check_nothing_else_changes(mesh, microbatches)


def test_a_known_noise_scale_is_found_whatever_the_parts_count():
    rng = np.random.default_rng(0)
    steps, parts, size = 4000, 6, 40
    truth = rng.normal(size=size) / np.sqrt(size)
    deviations = rng.uniform(0.2, 1.5, size)
    counts = rng.integers(1, 9, (steps, parts)).astype(np.float32)
    counts[::2, 0] = 0
    sums = counts[..., None] * truth + np.sqrt(counts)[..., None] * deviations * rng.normal(size=(steps, parts, size))

    @jax.jit
    @jax.vmap
    def of_step(sums, counts):
        like = jnp.zeros(size)
        masks = (jnp.arange(8)[None] < counts[:, None]).astype(jnp.float32)[:, None]
        squares = [noise_scale.part_squares(like, s, mask) for s, mask in zip(sums, masks, strict=True)]
        return noise_scale.estimate(jax.tree.map(lambda *x: sum(x), *squares), like, sums.sum(0), masks)

    found = jax.tree.map(np.asarray, of_step(jnp.asarray(sums, jnp.float32), counts))
    variance, signal = found["noise_variance"], found["noise_signal"]
    assert signal.min() < 0, "no estimate is cut off at zero: that would be a bias"
    np.testing.assert_allclose(variance.mean(), (deviations**2).sum(), rtol=0.01)
    np.testing.assert_allclose(signal.mean(), (truth**2).sum(), atol=4 * signal.std() / np.sqrt(steps))
    np.testing.assert_allclose(variance.mean() / signal.mean(), (deviations**2).sum() / (truth**2).sum(), rtol=0.05)


@pytest.mark.parametrize(
    ("mesh", "microbatches", "message"),
    [
        (MeshConfig(1, 8, 1, layout="zero3"), 1, "only one; set config.train.microbatches=2"),
        (MeshConfig(2, 4, 1, layout="zero2"), 1, "only one; set config.train.microbatches=2"),
        (MeshConfig(4, 1, 1, stage=2), 4, "not measured through a pipeline"),
    ],
)
def test_what_cannot_be_measured_is_refused(mesh, microbatches, message):
    config = TrainConfig(microbatches=microbatches, noise_scale=True)
    with pytest.raises(UserError, match=message):
        noise_scale.check_noise_scale(config, Rules.make(mesh))
