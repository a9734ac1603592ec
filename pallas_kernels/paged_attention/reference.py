"""The core as its definition says it, in float32, every row against every token: the oracle of the other backends."""

import jax.numpy as jnp

from pallas_kernels.paged_attention.segments import Carry, ordered_block


def attend(
    query,
    position,
    cache,
    layer,
    block_table,
    segments,
    *,
    outputs,
    decode,
    window,
    scale,
    softcap,
    carry=None,
    ordered=False,
    config=None,
):
    """See `pallas_kernels.paged_attention.segments`. Memory grows with rows times segments' tokens."""
    del config, decode
    key, value = _tokens(cache, layer, block_table)
    rows, heads, head_dim = query.shape
    group = heads // key.shape[2]
    # For every output: which row of `query` it is, and which segment; a row that none writes belongs to none.
    out = jnp.arange(outputs)[:, None]
    mine = (out >= segments.out_begin) & (out < segments.out_begin + segments.query_count)
    segment = jnp.argmax(mine, axis=1)
    row = jnp.clip(segments.query_begin[segment] + out[:, 0] - segments.out_begin[segment], 0, rows - 1)
    table_row = segments.table_row[segment]
    k = jnp.repeat(key[table_row], group, axis=2)
    v = jnp.repeat(value[table_row], group, axis=2)
    logits = scale * jnp.einsum("rhd,rkhd->rhk", query[row].astype(jnp.float32), k, precision="highest")
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    token, p = jnp.arange(k.shape[1])[None, :], position[row][:, None]
    visible = (token >= segments.kv_begin[segment][:, None]) & (token < segments.kv_end[segment][:, None])
    visible &= (token <= p) & mine.any(axis=1)[:, None]
    if window is not None:
        visible &= token > p - window
    visible = visible[:, None]
    if not ordered:
        carry = _add(Carry.nothing(outputs, heads, head_dim), logits, v, visible)
        return finish(carry)
    carry = Carry.nothing(outputs, heads, head_dim) if carry is None else carry
    block = ordered_block(cache.page_size)
    for begin in range(0, k.shape[1], block):
        part = slice(begin, begin + block)
        carry = _add(carry, logits[..., part], v[:, part], visible[..., part])
    return carry


def finish(carry):
    """The output and its log-sum-exp, from a `Carry` whose unit of ``peak`` is the natural logarithm."""
    out = carry.total / jnp.where(carry.weight == 0, 1.0, carry.weight)[..., None]
    return out, carry.peak + jnp.log(carry.weight)


def _add(carry, logits, value, visible):
    """Goes on with some more tokens."""
    logits = jnp.where(visible, logits, -jnp.inf)
    peak = jnp.maximum(carry.peak, logits.max(axis=-1))
    shift = jnp.where(jnp.isneginf(peak), 0.0, peak)
    weights = jnp.exp(logits - shift[..., None])
    decay = jnp.exp(carry.peak - shift)
    # Slack of a page may hold anything, NaN too.
    seen = jnp.where(visible.any(axis=1)[..., None, None], value, 0.0)
    total = carry.total * decay[..., None] + jnp.einsum("rhk,rkhd->rhd", weights, seen, precision="highest")
    return Carry(total, carry.weight * decay + weights.sum(axis=-1), peak)


def _tokens(cache, layer, block_table):
    """Keys and values ``[sequences, tokens, kv_heads, head_dim]`` in float32."""

    def gather(pages, scales):
        x = pages[layer][block_table].astype(jnp.float32)
        if scales is not None:
            x = x * jnp.swapaxes(scales[layer][block_table], -1, -2)[..., None]
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    return gather(cache.key, cache.key_scale), gather(cache.value, cache.value_scale)
