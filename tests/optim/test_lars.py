"""LARS against float64 transcriptions of both published forms."""

import jax
import numpy as np
import optax
import pytest

from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer


def paper_form(x, gs, lr, beta, decay, excluded):
    """LAMB paper, Algorithm 1: the ratio normalises the momentum."""
    x, m = np.float64(x), np.zeros(x.shape)
    for g in np.float64(gs):
        m = beta * m + (1 - beta) * (g if excluded else g + decay * x)
        x = x - lr * (1.0 if excluded else np.linalg.norm(x) / np.linalg.norm(m)) * m
    return x


def form_of_2017(x, gs, lr, beta, decay, excluded):
    """You, Gitman, Ginsburg: the ratio scales the gradient, momentum comes last."""
    x, v = np.float64(x), np.zeros(x.shape)
    for g in np.float64(gs):
        ratio = 0.001 * np.linalg.norm(x) / (np.linalg.norm(g) + decay * np.linalg.norm(x))
        v = beta * v + lr * (g if excluded else ratio * (g + decay * x))
        x = x - v
    return x


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize(("name", "reference", "lr"), [("lars", paper_form, 0.05), ("lars_2017", form_of_2017, 8.0)])
def test_equals_the_paper(axes, params, gradients, name, reference, lr, decay):
    config = OptimizerConfig(name=name, learning_rate=lr, weight_decay=decay)
    transform, _ = make_optimizer(config, ScheduleConfig(kind="constant"), total_steps=9, batch_size=8, axes=axes)
    state, update, actual = transform.init(params), jax.jit(transform.update), params
    for g in gradients:
        updates, state = update(g, state, actual)
        actual = optax.apply_updates(actual, updates)

    def pick(tree, *path):
        for key in path:
            tree = tree[key]
        return tree

    for path, layers in [
        (("layers", "moe", "up", "kernel"), np.ndindex(2, 2)),
        (("layers", "attention", "query", "bias"), np.ndindex(2)),
        (("layers", "attention", "query", "kernel"), np.ndindex(2)),
        (("final_norm", "scale"), [()]),
        (("unembed", "kernel"), [()]),
    ]:
        for layer in layers:
            start = pick(params, *path)[layer]
            gs = np.stack([pick(g, *path)[layer] for g in gradients])
            expected = reference(start, gs, lr, 0.9, decay, path[-1] in ("bias", "scale"))
            moved = np.float64(pick(actual, *path)[layer]) - start
            scale = np.max(np.abs(expected - start))
            assert scale > 1e-3
            np.testing.assert_allclose(moved / scale, (expected - start) / scale, atol=1e-4, err_msg=str((path, layer)))


def test_gradients_times_1000_change_nothing(axes, params, gradients):
    config = OptimizerConfig(name="lars", learning_rate=0.05)
    transform, _ = make_optimizer(config, ScheduleConfig(kind="constant"), total_steps=9, batch_size=8, axes=axes)
    update, state = jax.jit(transform.update), transform.init(params)
    one, _ = update(gradients[0], state, params)
    many, _ = update(jax.tree.map(lambda g: 1000 * g, gradients[0]), state, params)
    np.testing.assert_allclose(one["unembed"]["kernel"], many["unembed"]["kernel"], rtol=1e-5)
