"""Merging of partial softmaxes, against the softmax of the whole in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.log_sum_exp import merge, merge_all


def parts():
    """Results of four parts of the keys, some of which some rows do not see, with the whole's."""
    rng = np.random.default_rng(0)
    logits, values = 30 * rng.normal(size=(5, 12)), rng.normal(size=(12, 3))
    logits[0] = -np.inf  # sees nothing at all
    logits[1, :6] = -np.inf
    with np.errstate(divide="ignore"):

        def result(columns):
            weights = np.exp(logits[:, columns])
            total = weights.sum(1)
            out = weights @ values[columns] / np.where(total == 0, 1, total)[:, None]
            return np.float32(out), np.float32(np.log(total))

        return [result(np.arange(i, i + 3)) for i in range(0, 12, 3)], result(np.arange(12))


def close(one, other):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), one, other)


def test_parts_merge_to_the_whole_in_any_order():
    (a, b, c, d), whole = parts()
    assert np.isneginf(whole[1][0]) and np.isneginf(a[1][1]) and not np.isneginf(whole[1][1])
    close(functools.reduce(merge, (a, b, c, d)), whole)
    close(merge(merge(d, b), merge(c, a)), whole)
    close(merge(a, b), merge(b, a))
    stacked = [np.stack(x) for x in zip(a, b, c, d, strict=True)]
    close(merge_all(*stacked), whole)
    close(merge_all(*(np.moveaxis(x, 0, 1) for x in stacked), axis=1), whole)


def test_nothing_is_the_neutral_element():
    (a, *_), _ = parts()
    nothing = jnp.zeros_like(a[0]), jnp.full_like(a[1], -jnp.inf)
    for pair in ((a, nothing), (nothing, a), (nothing, nothing)):
        jax.tree.map(np.testing.assert_array_equal, merge(*pair), pair[0] if pair[1] is nothing else pair[1])


def test_derivatives_are_finite_and_those_of_the_formula():
    (a, b, _, _), _ = parts()

    def plain(a, b):
        x, y = jnp.exp(a[1] - 20.0), jnp.exp(b[1] - 20.0)
        return (x[:, None] * a[0] + y[:, None] * b[0]) / (x + y)[:, None], 20.0 + jnp.log(x + y)

    def gradient(function, rows):
        loss = lambda a, b: sum(jnp.sin(x[rows]).sum() for x in function(a, b))  # noqa: E731
        return jax.grad(loss, (0, 1))(a, b)

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient(lambda a, b: merge(a, b)[:1], slice(None))))
    ours, theirs = (jax.tree.map(lambda x: x[2:], gradient(f, slice(2, None))) for f in (merge, plain))
    close(ours, theirs)
