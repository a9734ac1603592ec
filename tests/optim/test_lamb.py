"""LAMB against a float64 transcription of Algorithm 2 (You et al. 2020)."""

import jax
import numpy as np
import optax
import pytest

from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer


def algorithm_2(params, gradients, axes, *, lr, b1, b2, eps, decay, bias_correction, clip, phi, ratio_max, excluded):
    """The paper's loop over steps and layers, one tensor at a time, in float64."""
    xs = jax.tree.map(np.float64, params)
    ms, vs = jax.tree.map(np.zeros_like, xs), jax.tree.map(np.zeros_like, xs)
    for t, gs in enumerate(gradients, start=1):
        gs = jax.tree.map(np.float64, gs)
        norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gs)))
        if clip and norm > clip:
            gs = jax.tree.map(lambda g, norm=norm: g * clip / norm, gs)
        for path, _ in jax.tree_util.tree_leaves_with_path(xs):
            x, m, v, g = (_at(tree, path) for tree in (xs, ms, vs, gs))
            names = _at(axes, path)
            is_excluded = path[-1].key in excluded
            stacked = [i for i, name in enumerate(names) if name in ("layers", "expert")]
            assert stacked == list(range(len(stacked)))
            for layer in np.ndindex(*(x.shape[i] for i in stacked)):
                m[layer] = b1 * m[layer] + (1 - b1) * g[layer]
                v[layer] = b2 * v[layer] + (1 - b2) * g[layer] ** 2
                mh, vh = (m[layer] / (1 - b1**t), v[layer] / (1 - b2**t)) if bias_correction else (m[layer], v[layer])
                u = mh / (np.sqrt(vh) + eps)
                if is_excluded:
                    x[layer] -= lr * u
                    continue
                u = u + decay * x[layer]
                x_norm, u_norm = np.linalg.norm(x[layer]), np.linalg.norm(u)
                ratio = min(phi(x_norm) / u_norm, ratio_max) if x_norm > 0 and u_norm > 0 else 1.0
                x[layer] -= lr * ratio * u
    return xs


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def train(config, axes, params, gradients):
    transform, _ = make_optimizer(config, ScheduleConfig(kind="constant"), total_steps=10, batch_size=8, axes=axes)
    state = jax.jit(transform.init)(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for g in gradients:
        params, state = step(params, state, g)
    return params


def largest_difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.max(np.abs(x - y) / np.max(np.abs(y))), a, b)))


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize(
    ("decay", "clip", "options"),
    [(0.0, 0.0, {}), (0.3, 0.0, {}), (0.1, 0.5, {"norm_max": 10.0}), (0.1, 0.0, {"ratio_max": 2.0, "norm_min": 6.0})],
)
def test_equals_algorithm_2(axes, params, gradients, bias_correction, decay, clip, options):
    config = OptimizerConfig(
        name="lamb",
        learning_rate=0.02,
        weight_decay=decay,
        clip_norm=clip,
        options={"bias_correction": bias_correction, "b2": 0.99, **options},
    )
    expected = algorithm_2(
        params, gradients, axes, lr=0.02, b1=0.9, b2=0.99, eps=1e-6, decay=decay, bias_correction=bias_correction,
        clip=clip, phi=lambda z: min(max(z, options.get("norm_min", 0.0)), options.get("norm_max", np.inf)),
        ratio_max=options.get("ratio_max", np.inf), excluded=("bias", "scale"),
    )  # fmt: skip
    actual = train(config, axes, params, gradients)
    moved = jax.tree.map(lambda x, y: x - np.float64(y), expected, params)
    assert largest_difference(jax.tree.map(lambda x, y: np.float64(x) - y, actual, params), moved) < 1e-4
    assert largest_difference(actual, expected) < 1e-6


def test_exclusion_lists_may_differ(axes, params, gradients):
    # `scale` neither decays nor is rescaled; `bias` does not decay but is rescaled; `embed` decays but is not rescaled.
    config = OptimizerConfig(
        name="lamb", learning_rate=0.1, weight_decay=0.5, options={"no_adaptation": ("scale", "embed"), "eps": 1e-12}
    )
    moved = jax.tree.map(lambda a, b: np.float64(a) - b, train(config, axes, params, gradients[:1]), params)
    sign = jax.tree.map(np.sign, gradients[0])  # Adam's first direction
    np.testing.assert_allclose(moved["final_norm"]["scale"], -0.1 * sign["final_norm"]["scale"], rtol=1e-4)
    embedding = sign["embed"]["embedding"] + 0.5 * params["embed"]["embedding"]
    np.testing.assert_allclose(moved["embed"]["embedding"], -0.1 * embedding, rtol=1e-3, atol=1e-6)
    bias, signs = (tree["layers"]["attention"]["query"]["bias"] for tree in (params, sign))
    ratio = [np.linalg.norm(bias[layer]) / np.sqrt(8) for layer in range(2)]
    np.testing.assert_allclose(
        moved["layers"]["attention"]["query"]["bias"], -0.1 * np.reshape(ratio, (2, 1, 1)) * signs, rtol=1e-3
    )


def test_each_adapted_tensor_moves_by_the_learning_rate_times_its_norm(axes, params, gradients):
    config = OptimizerConfig(name="lamb", learning_rate=0.05, weight_decay=0.1)
    moved = jax.tree.map(lambda a, b: np.float64(a) - b, train(config, axes, params, gradients[:1]), params)
    kernel = moved["layers"]["moe"]["up"]["kernel"], params["layers"]["moe"]["up"]["kernel"]
    moved_norm, norm = (np.linalg.norm(x.reshape(2, 2, -1), axis=-1) for x in kernel)
    np.testing.assert_allclose(moved_norm, 0.05 * norm, rtol=1e-5)


def test_gradients_times_1000_change_nothing(axes, params, gradients):
    config = OptimizerConfig(name="lamb", learning_rate=0.02, weight_decay=0.1, options={"eps": 1e-12})
    big = jax.tree.map(lambda g: 1000 * g, gradients)
    assert largest_difference(train(config, axes, params, gradients), train(config, axes, params, big)) < 1e-6


def test_first_moment_may_be_stored_in_bfloat16(axes, params, gradients):
    exact = train(OptimizerConfig("lamb", 0.02, options={"bias_correction": False}), axes, params, gradients)
    config = OptimizerConfig("lamb", 0.02, options={"bias_correction": False, "mu_dtype": "bfloat16"})
    transform, _ = make_optimizer(config, ScheduleConfig(), total_steps=10, batch_size=8, axes=axes)
    assert jax.eval_shape(transform.init, params)[0].mu["unembed"]["kernel"].dtype == "bfloat16"
    assert largest_difference(train(config, axes, params, gradients), exact) < 1e-2
