"""Chunks of a paged cache, gathered and widened to float32, in the layout that the product with them wants."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.platform import platform


@functools.partial(jax.tree_util.register_dataclass, data_fields=("pages", "offsets", "visible"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Chunk:
    """Where the tokens of a chunk lie. Those that nobody may see are replaced by one that somebody may.

    So whatever is gathered was stored by someone: slack of a page and others' pages, which may hold NaN, are not read.

    Attributes:
      pages: of each token, in the cache.
      offsets: of each token, in its page.
      visible: whether it is the token that it stands for.
    """

    pages: Int[Array, "lanes tokens"]
    offsets: Int[Array, "lanes tokens"]
    visible: Bool[Array, "lanes tokens"]


def locate(
    table: Int[Array, "lanes pages_per_sequence"],
    first: Int[Array, " lanes"],
    low: Int[Array, " lanes"],
    high: Int[Array, " lanes"],
    *,
    tokens: int,
    page_size: int,
) -> Chunk:
    """The chunk of so many ``tokens`` from ``first`` on, of which ``low <= j < high`` may be seen."""
    token = first[:, None] + jnp.arange(tokens, dtype=jnp.int32)
    visible = (token >= low[:, None]) & (token < high[:, None])
    token = jnp.where(visible, token, low[:, None])
    token = jnp.clip(token, 0, table.shape[1] * page_size - 1)
    pages = jnp.take_along_axis(table, token // page_size, axis=1, mode="promise_in_bounds")
    return Chunk(pages, token % page_size, visible)


def by_head(x: jax.Array, layer: jax.Array, chunk: Chunk) -> Float[Array, "lanes kv_heads tokens head_dim"]:
    """A chunk with the heads outermost, as a matrix product for each of them wants it."""
    if platform() != "cpu":
        return by_token(x, layer, chunk).swapaxes(1, 2)
    kv_heads, head_dim = x.shape[3:]
    row = _token(x, layer, chunk)[:, None, :] * kv_heads + jnp.arange(kv_heads, dtype=jnp.int32)[:, None]
    return _rows(x.reshape(-1, head_dim), row)


def by_token(x: jax.Array, layer: jax.Array, chunk: Chunk) -> Float[Array, "lanes tokens kv_heads head_dim"]:
    """A chunk as it is stored."""
    if platform() != "cpu":
        # Merging the axes of a cache, as below, might mean to lay it out anew there.
        return x.at[layer, chunk.pages, chunk.offsets].get(mode="promise_in_bounds").astype(jnp.float32)
    kv_heads, head_dim = x.shape[3:]
    rows = _rows(x.reshape(-1, kv_heads * head_dim), _token(x, layer, chunk))
    return rows.reshape(*rows.shape[:-1], kv_heads, head_dim)


def scales(x: jax.Array, layer: jax.Array, chunk: Chunk) -> Float[Array, "lanes kv_heads tokens"]:
    """The scales of a chunk of a quantized cache."""
    return jnp.moveaxis(x.at[layer, chunk.pages, :, chunk.offsets].get(mode="promise_in_bounds"), -1, 1)


def _token(x: jax.Array, layer: jax.Array, chunk: Chunk) -> jax.Array:
    return (layer * x.shape[1] + chunk.pages) * x.shape[2] + chunk.offsets


def _rows(x: jax.Array, row: jax.Array) -> jax.Array:
    """Rows of a matrix: with one index for each, XLA:CPU copies whole rows, several times as fast as where it has to
    take the index of every element apart."""
    # The compiler would widen the whole cache once, ahead of the loop, did it not seem to change with the indices.
    x, row = jax.lax.optimization_barrier((x, row))
    return x.at[row].get(mode="promise_in_bounds").astype(jnp.float32)
