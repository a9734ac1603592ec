"""Segments of one row each, as in decoding: chunks of several of them are computed in one step."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.log_sum_exp import merge_all
from pallas_kernels.paged_attention import xla_chunks
from pallas_kernels.paged_attention.cache import PagedCache
from pallas_kernels.paged_attention.xla_scores import PRECISION, capped, seen


def attend_rows(
    query, position, cache: PagedCache, layer, block_table, segments, active, *, lanes, chunk, wide, **scores
):
    """The results of those segments that are ``active``, in the segments' order.

    The chunks of all segments, one segment after the other, are cut into ``lanes`` runs of equally many. Each lane goes
    through its run with an online softmax; a segment that lies in several lanes is merged at the end. So the number of
    steps depends on the sum of the lengths only, and a step has enough work for all cores.

    Args:
      query: ``[rows, kv_heads, group, head_dim]``, float32 and scaled.
      position, cache, layer, block_table, segments: see `pallas_kernels.paged_attention.segments`.
      active: which segments.
      lanes, chunk, wide: see `pallas_kernels.paged_attention.xla.XlaConfig`.
      **scores: ``window`` and ``softcap``.

    Returns:
      Output ``[segments, kv_heads, group, head_dim]`` and log-sum-exp ``[segments, kv_heads, group]``.
    """
    count, (kv_heads, group, head_dim) = active.shape[0], query.shape[1:]
    row = jnp.clip(segments.query_begin, 0, query.shape[0] - 1)
    low, high = seen(position[row], segments.kv_begin, segments.kv_end, scores["window"])
    chunks = jnp.where(active & (low < high), -(-(high - low) // chunk), 0)
    ends = jnp.cumsum(chunks, dtype=jnp.int32)
    total = ends[-1]
    steps = -(-total // lanes)
    lane = jnp.arange(lanes, dtype=jnp.int32)
    # Where each lane starts, counted in segments that have work.
    busy = jnp.argsort(chunks == 0, stable=True).astype(jnp.int32)
    first = jnp.clip(lane * steps, 0, jnp.maximum(total - 1, 0))
    segment = jnp.minimum(jnp.searchsorted(ends, first, side="right").astype(jnp.int32), count - 1)
    at = jnp.cumsum(chunks > 0, dtype=jnp.int32)[segment] - 1, first - (ends - chunks)[segment]

    def work(step, at):
        """What the lanes do next: made a step ahead, so that no inner loop computes it over and over."""
        segment = busy[at[0]]
        left = lane * steps + step < jnp.minimum((lane + 1) * steps, total)
        where = xla_chunks.locate(
            block_table[jnp.clip(segments.table_row[segment], 0, block_table.shape[0] - 1)],
            low[segment] + at[1] * chunk,
            low[segment],
            high[segment],
            tokens=chunk,
            page_size=cache.page_size,
        )
        slot = jnp.where(left, segment + lane, count + lanes - 1)  # the last is for lanes that have finished
        continued = (step > 0) & (at[1] > 0)
        return where, slot, jnp.broadcast_to(continued, lane.shape), query[row[segment]]

    def advance(at):
        more = at[1] + 1 < chunks[busy[at[0]]]
        return jnp.where(more, at[0], jnp.minimum(at[0] + 1, count - 1)), jnp.where(more, at[1] + 1, 0)

    def step(i, state):
        outs, lses, total, weight, peak, at, (where, slot, continued, q) = state
        before = total, weight, jnp.where(continued[:, None, None], peak, -jnp.inf)
        total, weight, peak = _add(before, q, cache, layer, where, wide, scores["softcap"])
        out, lse = total / weight[..., None], peak + jnp.log(weight)
        for r in range(lanes):
            outs = lax.dynamic_update_index_in_dim(outs, out[r], slot[r], 0)
            lses = lax.dynamic_update_index_in_dim(lses, lse[r], slot[r], 0)
        at = advance(at)
        return outs, lses, total, weight, peak, at, work(i + 1, at)

    shape = (kv_heads, group)
    slots = (
        jnp.zeros((count + lanes, *shape, head_dim)),
        jnp.full((count + lanes, *shape), -jnp.inf),
    )
    state = (jnp.zeros((lanes, *shape, head_dim)), jnp.zeros((lanes, *shape)), jnp.zeros((lanes, *shape)))
    outs, lses, *_ = lax.fori_loop(0, steps, step, (*slots, *state, at, work(0, at)))
    # Segment s of lane r was written to slot s + r: no two share a slot, for the lanes' runs follow one another.
    parts = jnp.stack([outs[r : r + count] for r in range(lanes)])
    part_lses = jnp.stack([lses[r : r + count] for r in range(lanes)])
    per = jnp.maximum(steps, 1)
    begin, end = (ends - chunks) // per, (ends - 1) // per
    there = (chunks > 0) & (begin <= lane[:, None]) & (lane[:, None] <= end)
    part_lses = jnp.where(there[..., None, None], part_lses, -jnp.inf)
    parts = jnp.where(there[..., None, None, None], parts, 0.0)
    return (parts[0], part_lses[0]) if lanes == 1 else merge_all(parts, part_lses)


def attend_short_rows(
    query, position, cache: PagedCache, layer, block_table, segments, active, *, lanes, chunk, wide, **scores
):
    """`attend_rows` for segments of few chunks: in the order of their lengths, ``lanes`` at a time.

    Nothing has to be merged, and results are stored a block at a time; but a long segment would keep its lane alone.
    """
    count, (kv_heads, group, head_dim) = active.shape[0], query.shape[1:]
    row = jnp.clip(segments.query_begin, 0, query.shape[0] - 1)
    low, high = seen(position[row], segments.kv_begin, segments.kv_end, scores["window"])
    length = jnp.where(active, jnp.maximum(high - low, 0), 0)
    order = jnp.argsort(-length, stable=True).astype(jnp.int32)
    blocks = -(-count // lanes)
    padded = jnp.pad(order, (0, blocks * lanes - count))
    shape = (lanes, kv_heads, group)

    def block(i, results):
        segment = lax.dynamic_slice_in_dim(padded, i * lanes, lanes)
        table = block_table[jnp.clip(segments.table_row[segment], 0, block_table.shape[0] - 1)]
        begin, end, q = low[segment], high[segment], query[row[segment]]

        def step(c, state):
            where = xla_chunks.locate(table, begin + c * chunk, begin, end, tokens=chunk, page_size=cache.page_size)
            return _add(state, q, cache, layer, where, wide, scores["softcap"])

        nothing = jnp.zeros((*shape, head_dim)), jnp.zeros(shape), jnp.full(shape, -jnp.inf)
        total, weight, peak = lax.fori_loop(0, -(-length[segment[0]] // chunk), step, nothing)
        sees = (begin < end)[:, None, None]
        out = jnp.where(sees[..., None], total / weight[..., None], 0.0)
        new = out, jnp.where(sees, peak + jnp.log(weight), -jnp.inf)
        return tuple(lax.dynamic_update_slice_in_dim(x, y, i * lanes, 0) for x, y in zip(results, new, strict=True))

    empty = (
        jnp.zeros((blocks * lanes, kv_heads, group, head_dim)),
        jnp.full((blocks * lanes, kv_heads, group), -jnp.inf),
    )
    used = -(-jnp.sum(length > 0, dtype=jnp.int32) // lanes)
    results = lax.fori_loop(0, used, block, empty)
    place = jnp.zeros(count, jnp.int32).at[order].set(jnp.arange(count, dtype=jnp.int32), unique_indices=True)
    return tuple(x[place] for x in results)


def _add(state, q, cache: PagedCache, layer, where: xla_chunks.Chunk, wide, softcap):
    """Adds a chunk to the unfinished ``(total, weight, peak)`` of each lane's online softmax."""
    total, weight, before = state
    if wide:
        logits = wide_logits(q, xla_chunks.by_token(cache.key, layer, where))
    else:
        logits = narrow_logits(q, xla_chunks.by_head(cache.key, layer, where))
    if cache.key_scale is not None:
        logits = logits * xla_chunks.scales(cache.key_scale, layer, where)[:, :, None]
    logits = jnp.where(where.visible[:, None, None], capped(logits, softcap), -jnp.inf)
    peak = jnp.maximum(before, logits.max(axis=-1))  # finite: a lane's first chunk has a token that is seen
    weights = jnp.exp(logits - peak[..., None])
    decay = jnp.exp(before - peak)
    weight = weight * decay + weights.sum(axis=-1)
    if cache.value_scale is not None:
        weights = weights * xla_chunks.scales(cache.value_scale, layer, where)[:, :, None]
    value = xla_chunks.by_token(cache.value, layer, where)
    new = (wide_sum if wide else narrow_sum)(weights, value)
    return total * decay[..., None] + new, weight, peak


def narrow_logits(
    q: Float[Array, "lanes kv_heads group head_dim"], key: Float[Array, "lanes kv_heads tokens head_dim"]
) -> Float[Array, "lanes kv_heads group tokens"]:
    """A product for each head."""
    return jnp.einsum("rhtd,rhgd->rhtg", key, q, precision=PRECISION()).swapaxes(-1, -2)


def narrow_sum(
    weights: Float[Array, "lanes kv_heads group tokens"], value: Float[Array, "lanes tokens kv_heads head_dim"]
) -> Float[Array, "lanes kv_heads group head_dim"]:
    """The weighted sum of values, without a matrix product."""
    return (weights.transpose(0, 3, 1, 2)[..., None] * value[:, :, :, None]).sum(axis=1)


def wide_logits(
    q: Float[Array, "lanes kv_heads group head_dim"], key: Float[Array, "lanes tokens kv_heads head_dim"]
) -> Float[Array, "lanes kv_heads group tokens"]:
    """One product of all heads with all: the keys stay as they are stored, and the other heads' part is nothing."""
    lanes, kv_heads, group, head_dim = q.shape
    own = jnp.eye(kv_heads, dtype=q.dtype)[:, None, :, None]
    diagonal = (q.transpose(0, 1, 3, 2)[:, :, :, None] * own).reshape(lanes, kv_heads * head_dim, kv_heads * group)
    logits = jnp.einsum("rtc,rcq->rtq", key.reshape(lanes, -1, kv_heads * head_dim), diagonal, precision=PRECISION())
    return lax.optimization_barrier(logits).swapaxes(1, 2).reshape(lanes, kv_heads, group, -1)


def wide_sum(
    weights: Float[Array, "lanes kv_heads group tokens"], value: Float[Array, "lanes tokens kv_heads head_dim"]
) -> Float[Array, "lanes kv_heads group head_dim"]:
    """The weighted sum of all heads' values with all heads' weights, of which the heads' own are kept."""
    lanes, kv_heads, group, tokens = weights.shape
    values = value.reshape(lanes, tokens, -1)
    every = jnp.einsum("rqt,rtc->rqc", weights.reshape(lanes, -1, tokens), values, precision=PRECISION())
    every = every.reshape(lanes, kv_heads, group, kv_heads, -1)
    return jnp.stack([every[:, head, :, head] for head in range(kv_heads)], axis=1)
