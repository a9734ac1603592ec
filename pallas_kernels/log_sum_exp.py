"""Exact merging of softmax over parts of the keys, from each part's output and log-sum-exp."""

import jax.numpy as jnp
from jaxtyping import Array, Float

Result = tuple[Float[Array, "*rows head_dim"], Float[Array, "*rows"]]


def merge(first: Result, second: Result) -> Result:
    """The result of attending to two disjoint sets of keys, from those of each: exact, associative and commutative.

    A result is the output and the natural logarithm of its sum of exponentiated logits, both float32; where nothing was
    seen they are 0 and -inf.
    """
    return merge_all(jnp.stack([first[0], second[0]]), jnp.stack([first[1], second[1]]))


def merge_all(out: Float[Array, "parts *rows head_dim"], lse: Float[Array, "parts *rows"]) -> Result:
    """`merge` over the leading axis."""
    peak = jnp.max(lse, axis=0)
    shares = jnp.exp(lse - jnp.where(jnp.isneginf(peak), 0.0, peak))
    total = shares.sum(axis=0)
    out = (shares[..., None] * out).sum(axis=0) / jnp.where(total == 0, 1.0, total)[..., None]
    return out, peak + jnp.log(total)
