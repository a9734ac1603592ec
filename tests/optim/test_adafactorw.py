"""AdaFactorW (`ml/optim/memory_saving.py`) against a float64 transcription, and the bytes of its state."""

import jax
import jax.numpy as jnp
import numpy as np

from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer

RATE, DECAY, MOMENTUM = 0.01, 0.1, 0.9


def transcription(params, gradients):
    """Shazeer and Stern 2018, algorithm 4 without relative steps, then a first moment and decoupled decay."""
    x, rows, columns, moment = params.astype(np.float64), 0.0, 0.0, 0.0
    for step, g in enumerate(gradients, 1):
        square, beta = g.astype(np.float64) ** 2 + 1e-30, 1 - step**-0.8
        rows = beta * rows + (1 - beta) * square.mean(axis=1)
        columns = beta * columns + (1 - beta) * square.mean(axis=0)
        update = g / np.sqrt(np.outer(rows, columns) / rows.mean())
        update = update / max(1.0, np.sqrt((update**2).mean()))
        moment = MOMENTUM * moment + (1 - MOMENTUM) * update
        x = x - RATE * (moment + DECAY * x)
    return x


def test_updates_are_the_transcriptions_layer_by_layer_and_state_takes_two_bytes_an_element():
    rng = np.random.default_rng(0)
    params = {"layers": {"kernel": rng.normal(size=(2, 8, 16)).astype(np.float32)}}
    gradients = [rng.normal(size=(2, 8, 16)).astype(np.float32) * [[[1.0]], [[9.0]]] for _ in range(4)]
    axes = {"layers": {"kernel": ("layers", "embed", "mlp")}}
    config = OptimizerConfig("adafactorw", RATE, weight_decay=DECAY, options={"min_dim_size_to_factor": 2})
    tx, _ = make_optimizer(config, ScheduleConfig(kind="constant"), total_steps=9, batch_size=1, axes=axes)

    @jax.jit
    def run(params):
        state = tx.init(params)
        for g in gradients:
            updates, state = tx.update({"layers": {"kernel": jnp.float32(g)}}, state, params)
            params = jax.tree.map(jnp.add, params, updates)
        return params, state

    trained, state = run(params)
    moved = np.abs(trained["layers"]["kernel"] - params["layers"]["kernel"]).max()
    for layer in range(2):
        expected = transcription(params["layers"]["kernel"][layer], [g[layer] for g in gradients])
        # The first moment has 8 bits.
        np.testing.assert_allclose(trained["layers"]["kernel"][layer], expected, atol=moved * 0.01)
    moments = [x for x in jax.tree.leaves(state) if x.size == 2 * 8 * 16]
    assert [x.dtype for x in moments] == [jnp.bfloat16]
    assert sum(x.nbytes for x in jax.tree.leaves(state)) < 2 * 256 + 4 * 2 * (8 + 16 + 8)
