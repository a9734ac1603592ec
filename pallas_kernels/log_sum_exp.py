"""Softmax over parts of the keys: results that carry their log-sum-exp merge to that of the whole, exactly.

A result is the output ``softmax(logits) v`` of some keys, float32, and the natural logarithm of the sum of their
exponentiated logits, by which it can be weighed against others (Dao et al. 2022, FlashAttention, section 3.1; Liu et
al. 2023, Ring Attention). Where nothing was seen they are 0 and -inf, which is the neutral element. The sets of keys
must be disjoint; in which order they are merged does not matter, but for rounding. Derivatives are finite everywhere.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Result = tuple[Float[Array, "*rows head_dim"], Float[Array, "*rows"]]


def merge(first: Result, second: Result) -> Result:
    """The result of attending to two disjoint sets of keys, from those of each."""
    shift = _finite(jnp.maximum(first[1], second[1]))
    shares = jnp.exp(first[1] - shift), jnp.exp(second[1] - shift)
    total = shares[0] + shares[1]
    return _divided(shares[0][..., None] * first[0] + shares[1][..., None] * second[0], total, shift)


def merge_all(out: Float[Array, "..."], lse: Float[Array, "..."], axis: int = 0) -> Result:
    """`merge` of many results along ``axis``, at least 0, of both arrays."""
    shift = _finite(jnp.max(lse, axis=axis, keepdims=True))
    shares = jnp.exp(lse - shift)
    return _divided((shares[..., None] * out).sum(axis), shares.sum(axis), shift.squeeze(axis))


def _divided(weighted: jax.Array, total: jax.Array, shift: jax.Array) -> Result:
    some = jnp.where(total == 0, 1.0, total)
    return weighted / some[..., None], jnp.where(total == 0, -jnp.inf, shift + jnp.log(some))


def _finite(peak: jax.Array) -> jax.Array:
    """Any shift gives the same result, so that it has no derivative; -inf - -inf would be NaN."""
    return jax.lax.stop_gradient(jnp.where(jnp.isneginf(peak), 0.0, peak))
