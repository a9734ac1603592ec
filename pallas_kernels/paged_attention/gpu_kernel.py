"""The Mosaic GPU kernel of paged attention: one warpgroup loads pages by TMA, the others multiply by wgmma.

Every warpgroup that computes holds 64 rows: pairs of a query row and a head of its group, all of one kv head. In a
*split* launch, for segments of few rows, the warpgroups have the same rows and share out a stage's tokens, each with a
softmax of its own: such work waits for memory, and padding rows to 64 costs nothing but idle tensor cores. In a *wide*
launch each has rows of its own and sees all tokens of a stage.

Who waits for whom (the interpreter's race detector does not see a missing wait before a wgmma reads):

- ``loaded[slot]`` completes when all bytes of a stage's pages are in shared memory. TMA writes and wgmma reads are of
  the same (asynchronous) proxy, so that the wait alone orders them. Keys and values have a barrier each.
- ``free[slot]`` takes one arrival per warpgroup, after the read of an accumulator has waited for every wgmma (or, of a
  quantized stage, every load) that reads the stage. The loader waits for it before it overwrites the stage, but not the
  first time round. Likewise the queries' buffer, which all warpgroups give back after a piece's last block.
- What a warpgroup itself writes for wgmma (probabilities, widened or cleaned keys and values) passes the generic proxy:
  `commit_smem` fences it and joins the warpgroup's warps. It is overwritten after an accumulator that was made from it
  has been read.
- In a wide quantized launch each warpgroup widens its share of a stage for all. ``both`` joins them after the keys and
  after the values. Keys are overwritten after the join for the values, which follows the multiplication by the keys in
  every warpgroup; values after the join for the next keys, which follows the multiplication by the values.
- A page's slack is cleaned by each warpgroup for itself. In a wide launch two do it to the same bytes with the same
  zeros, each before its own multiplication: no value that is read depends on which was first.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.gpu_config import ROWS
from pallas_kernels.paged_attention.gpu_plan import Plan, load, tiled, transposed
from pallas_kernels.paged_attention.gpu_work import OVERHEAD, Column, Work

_LOG2E = math.log2(math.e)
LOW = -1e30  # a peak of nothing: finite, so that differences are; far below any logit
_WGMMA = plgpu.Layout.WGMMA
_ROW, _COLUMN = _WGMMA.reduce(1), _WGMMA.reduce(0)
# As `Layout.WGMMA`, but of tiles of 32 rows: 8 rows of 4 lanes to a warp, with 2 or 8 columns to a lane.
_PAIRS = plgpu.Layout.TILED(plgpu.Tiling(((32, 8), (8, 8), (2,))), (-5,), (-3, -2), -1)
_OCTETS = plgpu.Layout.TILED(plgpu.Tiling(((32, 32), (8, 32), (8,))), (-5,), (-3, -2), -1)


def attention(plan: Plan, work: Work, operands: dict[str, Any], *, interpret: Any) -> Any:
    """Runs the kernel; see `_kernel` for operands and results."""
    w, d, t = plan.warpgroups, plan.head_dim, plan.dtype
    # The last place is work.place's bound and those of all workers.
    places = work.place.size if plan.ordered else work.place.size + plan.workers
    out_type = {
        "out": jax.ShapeDtypeStruct((places, w, plan.rows, d), jnp.float32),
        "lse": jax.ShapeDtypeStruct((places, w, plan.rows), jnp.float32),
    }
    if plan.ordered:
        out_type["peak"] = jax.ShapeDtypeStruct((places, w, plan.rows), jnp.float32)
    pages = plan.block // plan.copy
    scratch: dict[str, Any] = {
        "q_s": plgpu.SMEM((plan.buffers, plan.sheets, ROWS, d), t, transforms=tiled(d, t)),
        "k_s": plgpu.SMEM((plan.stages, plan.parts, plan.part, d), plan.kept, transforms=tiled(d, plan.kept)),
        "v_s": plgpu.SMEM((plan.stages, plan.parts, plan.part, d), plan.kept, transforms=tiled(d, plan.kept)),
        "p_s": plgpu.SMEM((w, ROWS, plan.part), t, transforms=tiled(plan.part, t)),
        "q_loaded": plgpu.Barrier(num_arrivals=plan.sheets, num_barriers=plan.buffers),
        "q_free": plgpu.Barrier(num_arrivals=w, num_barriers=plan.buffers),
        "k_loaded": plgpu.Barrier(num_arrivals=pages, num_barriers=plan.stages),
        "v_loaded": plgpu.Barrier(num_arrivals=pages, num_barriers=plan.stages),
        "k_free": plgpu.Barrier(num_arrivals=w, num_barriers=plan.stages),
        "v_free": plgpu.Barrier(num_arrivals=w, num_barriers=plan.stages),
    }
    if plan.quantized:
        arrivals = pages + (plan.parts if plan.gathered_scales else pages)
        for name in ("k", "v"):
            scratch[f"{name}_loaded"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=plan.stages)
            scratch[f"{name}_scale_s"] = plgpu.SMEM((plan.stages, plan.parts, plan.part), jnp.float32)
            scratch[f"{name}_wide_s"] = plgpu.SMEM((plan.parts, plan.part, d), t, transforms=tiled(d, t))
        if not plan.split and w > 1:
            scratch["both"] = plgpu.Barrier(num_arrivals=w)
    if plan.split:
        scratch["o_s"] = plgpu.SMEM((w, ROWS, 64), jnp.float32)
    scratch["lse_s"] = plgpu.SMEM((w, ROWS), jnp.float32)
    names = (*operands, *out_type)

    def body(*refs: Any, **buffers: Any) -> None:
        _kernel(plan, {**dict(zip(names, refs, strict=True)), **buffers})

    options: dict[str, Any] = {} if interpret is None else {"interpret": interpret}
    result = plgpu.kernel(
        body,
        out_type=tuple(out_type.values()),
        scratch_types=scratch,
        grid=(plan.workers,),
        grid_names=("worker",),
        num_threads=w + 1,
        thread_name="warpgroup",
        kernel_name="paged_attention_" + ("ordered" if plan.ordered else "split" if plan.split else "wide"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **options,
    )(*operands.values())
    return dict(zip(out_type, result, strict=True))


def _kernel(plan: Plan, r: dict[str, Any]) -> None:
    """One worker.

    ``r`` holds references: ``query [units, sheets, rows, head_dim]``, ``position [tiles, sheets, ROWS]``, ``key`` and
    ``value [layers * pages, page_size, kv_heads, head_dim]``, ``layer_pages`` (pages before the layer), ``table``, the
    `Work`'s ``tiles``, ``spans`` and ``limits``, of an ordered call ``carry_* [units, sheets, ROWS, ...]``, the results
    ``out``, ``lse`` (log2; of an ordered call the weight) and ``peak``, and the buffers.
    """
    worker = lax.axis_index("worker")
    warpgroup = lax.axis_index("warpgroup")
    first, last = r["spans"][worker, 0], r["spans"][worker, 1]
    nothing = jnp.int32(0)

    @pl.when(warpgroup == plan.warpgroups)
    def _():
        if plan.warpgroups == 2:
            plgpu.set_max_registers(plan.registers[0], action="decrease")

        def step(unit, seen):
            return _load_piece(plan, r, worker, unit, seen)

        pieces, blocks = lax.fori_loop(first, last, step, (nothing, nothing))

        # Barriers end with every phase observed.
        for buffer in range(plan.buffers):

            @pl.when(pieces > buffer)
            def _(buffer=buffer):
                plgpu.barrier_wait(r["q_free"].at[buffer])

        for slot in range(plan.stages):

            @pl.when(blocks > slot)
            def _(slot=slot):
                plgpu.barrier_wait(r["k_free"].at[slot])
                plgpu.barrier_wait(r["v_free"].at[slot])

    @pl.when(warpgroup < plan.warpgroups)
    def _():
        if plan.warpgroups == 2:
            plgpu.set_max_registers(plan.registers[1], action="increase")
        step = functools.partial(_add_piece, plan, r, worker, warpgroup)
        lax.fori_loop(first, last, step, (nothing, nothing))
        if plan.split:
            plgpu.wait_smem_to_gmem(0)


def _piece(plan: Plan, r: dict[str, Any], worker: Any, unit: Any) -> tuple[Any, Any, Any, Any]:
    """The tile and the head of a unit, and this worker's blocks of it, begin and end, counted from token 0."""
    tile, head = lax.div(unit, jnp.int32(plan.kv_heads)), lax.rem(unit, jnp.int32(plan.kv_heads))

    def at(column):
        return r["tiles"][tile, column]

    block, blocks = at(Column.BLOCK), at(Column.BLOCKS)
    if plan.ordered:
        return tile, head, block, block + blocks
    per, cost = r["limits"][0], at(Column.COST)
    begin = worker * per - at(Column.START) - head * cost
    first = jnp.clip(begin - OVERHEAD, 0, blocks)
    last = jnp.clip(begin + per - OVERHEAD, 0, blocks)
    return tile, head, block + first, block + last


def _load_piece(plan: Plan, r: dict[str, Any], worker: Any, unit: Any, seen: Any) -> Any:
    """Fetches the queries and pages of one piece; ``seen``: pieces and blocks so far."""
    tile, head, begin, end = _piece(plan, r, worker, unit)

    def at(column):
        return r["tiles"][tile, column]

    row = at(Column.TABLE_ROW)
    size = jnp.int32(plan.page_size)
    first_page, last_page = lax.div(at(Column.BEGIN), size), lax.div(at(Column.END) - 1, size)
    base = r["layer_pages"][0]

    @pl.when(begin < end)
    def _():
        buffer = lax.rem(seen[0], jnp.int32(plan.buffers))

        @pl.when(seen[0] >= plan.buffers)
        def _():
            plgpu.barrier_wait(r["q_free"].at[buffer])

        # Rows that are not loaded hold anything: they stay in their own rows, which are not stored.
        for sheet in range(plan.sheets):
            to = r["q_s"].at[buffer, sheet, pl.ds(0, plan.rows)]
            plgpu.copy_gmem_to_smem(r["query"].at[unit, sheet], to, r["q_loaded"].at[buffer])

    def fetch(block: Any, done: Any) -> Any:
        slot = lax.rem(done, jnp.int32(plan.stages))
        token = block * plan.block
        places = []
        for i in range(0, plan.block, plan.copy):
            # Entries beyond the segment's tokens may be garbage: another page of it stands in, and the mask hides it.
            page = jnp.clip(lax.div(token + i, size), first_page, last_page)
            places.append((i, base + r["table"][row, page]))
        for name in ("k", "v"):

            @pl.when(done >= plan.stages)
            def _(name=name):
                plgpu.barrier_wait(r[f"{name}_free"].at[slot])

            source = r["key" if name == "k" else "value"]
            for i, page in places:
                within = _within_page(plan, token, i)
                to = pl.ds(i % plan.part, plan.copy)
                plgpu.copy_gmem_to_smem(
                    source.at[page, within, head],
                    r[f"{name}_s"].at[slot, i // plan.part, to],
                    r[f"{name}_loaded"].at[slot],
                )
            if plan.quantized:
                _load_scales(plan, r, name, slot, row, head, token, places)
        return done + 1

    done = lax.fori_loop(begin, end, fetch, seen[1])
    return seen[0] + (begin < end).astype(jnp.int32), done


def _within_page(plan, token, i):
    """The tokens of a page that one TMA takes, the first of them ``i`` after a block's first."""
    if plan.block % plan.page_size == 0:
        return pl.ds(i % plan.page_size, plan.copy)
    return pl.ds(pl.multiple_of(lax.rem(token + i, jnp.int32(plan.page_size)), plan.copy), plan.copy)


def _load_scales(plan, r, name, slot, row, head, token, places):
    source, loaded = r["key_scale" if name == "k" else "value_scale"], r[f"{name}_loaded"].at[slot]
    if plan.gathered_scales:
        for part in range(plan.parts):
            at = pl.ds(token + part * plan.part, plan.part)
            plgpu.copy_gmem_to_smem(source.at[row, head, at], r[f"{name}_scale_s"].at[slot, part], loaded)
        return
    for i, page in places:
        at = _within_page(plan, token, i)
        to = r[f"{name}_scale_s"].at[slot, i // plan.part, pl.ds(i % plan.part, plan.copy)]
        plgpu.copy_gmem_to_smem(source.at[page, head, at], to, loaded)


def _add_piece(plan: Plan, r: dict[str, Any], worker: Any, warpgroup: Any, unit: Any, seen: Any) -> Any:
    """Adds up one piece and stores it; ``seen``: pieces and blocks so far."""
    tile, _head, begin, end = _piece(plan, r, worker, unit)
    place = unit if plan.ordered else unit + worker

    @pl.when(begin < end)
    def _():
        def at(column):
            return r["tiles"][tile, column]

        sheet = 0 if plan.split else warpgroup
        position = load(r["position"].at[tile, sheet], _ROW)
        low = jnp.maximum(position - r["limits"][1] + 1, at(Column.BEGIN)) if plan.windowed else at(Column.BEGIN)
        high = jnp.minimum(position + 1, at(Column.END))
        if plan.ordered:
            state = _carried(plan, r, unit, sheet)
        else:

            def fill(shape, x, layout):
                return plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)

            total = fill((ROWS, plan.head_dim), 0.0, _WGMMA)
            state = (total, fill((ROWS,), LOW, _ROW), fill((ROWS,), 0.0, _ROW))
        buffer = lax.rem(seen[0], jnp.int32(plan.buffers))
        plgpu.barrier_wait(r["q_loaded"].at[buffer])
        limits = (low, high, *(at(c) for c in (Column.BEGIN, Column.END, Column.FULL_BEGIN, Column.FULL_END)))

        def step(block, state):
            return _add_block(plan, r, warpgroup, buffer, limits, block, seen[1] + block - begin, state)

        state = lax.fori_loop(begin, end, step, state)
        plgpu.barrier_arrive(r["q_free"].at[buffer])
        _store(plan, r, warpgroup, place, state)

    return seen[0] + (begin < end).astype(jnp.int32), seen[1] + end - begin


def _add_block(plan, r, warpgroup, buffer, limits, block, done, state):
    """One step of the online softmax. ``limits``: of the tokens that each row sees, the segment has, all rows see."""
    total, peak, weight = state
    low, high, begin, end, full_begin, full_end = limits
    if plan.quantized or plan.head_dim > 128:
        # Addresses that follow from this alone would be computed before the loop, and held throughout.
        warpgroup = lax.optimization_barrier(warpgroup)
    slot = lax.rem(done, jnp.int32(plan.stages))
    part = warpgroup if plan.split else warpgroup * 0  # an array: `run_state` takes no constants
    sheet = 0 if plan.split else warpgroup
    token = block * plan.block + part * plan.part
    full = (token >= full_begin) & (token + plan.part <= full_end)

    plgpu.barrier_wait(r["k_loaded"].at[slot])
    keys = _operand(plan, r, "k", slot, warpgroup, part)

    def multiply(acc):
        plgpu.wgmma(acc, r["q_s"].at[buffer, sheet], transposed(keys))
        return acc[...]

    logits = pl.run_scoped(multiply, plgpu.ACC((ROWS, plan.part), jnp.float32))
    if plan.quantized:
        scale = load(r["k_scale_s"].at[slot, part], _COLUMN)
        logits = logits * lax.broadcast_in_dim(scale, logits.shape, [1])
    plgpu.barrier_arrive(r["k_free"].at[slot])
    if plan.softcap is None:
        logits = logits * (plan.scale * _LOG2E)
    else:
        logits = jnp.tanh(logits * (plan.scale / plan.softcap)) * (plan.softcap * _LOG2E)

    def masked(logits):
        at = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=_WGMMA) + token
        visible = at < lax.broadcast_in_dim(high, logits.shape, [0])
        visible &= at >= (lax.broadcast_in_dim(low, logits.shape, [0]) if plan.windowed else low)
        return jnp.where(visible, logits, -jnp.inf)

    logits = lax.cond(full, lambda x: x, masked, logits)
    highest = jnp.maximum(peak, logits.max(axis=1))
    decay = jnp.exp2(peak - highest)
    p = jnp.exp2(logits - lax.broadcast_in_dim(highest, logits.shape, [0]))
    weight = weight * decay + p.sum(axis=1)
    plgpu.barrier_wait(r["v_loaded"].at[slot])
    if plan.quantized:
        scale = load(r["v_scale_s"].at[slot, part], _COLUMN)
        # The scale of a token that is not seen may be NaN.
        p = jnp.where(p > 0, p * lax.broadcast_in_dim(scale, p.shape, [1]), 0.0)
    r["p_s"][warpgroup] = p.astype(plan.dtype)
    values = _operand(plan, r, "v", slot, warpgroup, part, (token, begin, end))
    plgpu.commit_smem()

    def weigh(acc):
        plgpu.wgmma(acc, r["p_s"].at[warpgroup], values)

    def weighed(acc):
        weigh(acc)
        return acc[...]

    total = total * lax.broadcast_in_dim(decay, total.shape, [0])
    if plan.in_place:
        total = pl.run_state(weigh)(plgpu.ACC.init(total))
    else:
        total = total + pl.run_scoped(weighed, plgpu.ACC(total.shape, jnp.float32))
    plgpu.barrier_arrive(r["v_free"].at[slot])
    return total, highest, weight


def _operand(plan, r, name, slot, warpgroup, part, keep=None):
    """A part of a stage as wgmma reads it.

    ``keep``: the first token in it, and the segment's begin and end: what lies outside is made 0.
    """
    if not plan.quantized:
        ref = r[f"{name}_s"].at[slot, part]
        _clean(plan, ref, 0, plan.part, keep)
        return ref
    wide = r[f"{name}_wide_s"].at[part]
    share = plan.part if plan.split else plan.part // plan.warpgroups
    first = 0 if plan.split else pl.multiple_of(warpgroup * share, share)
    step, width = 32, 128 if plan.head_dim % 128 == 0 else 64

    def widen(i, _):  # a loop, not unrolled: its addresses would take registers
        for c in range(0, plan.head_dim, width):
            at = (pl.ds(pl.multiple_of(first + i * step, step), step), pl.ds(c, width))
            narrow = load(r[f"{name}_s"].at[(slot, part, *at)], _OCTETS)
            if plan.kept != jnp.int8:  # Hopper converts float8 to float16 only
                narrow = narrow.astype(jnp.float16).astype(jnp.float32)
            wide[at] = narrow.astype(plan.dtype)

    lax.fori_loop(0, share // step, widen, None)
    _clean(plan, wide, first, share, keep)
    plgpu.commit_smem()
    if not plan.split and plan.warpgroups > 1:
        plgpu.barrier_arrive(r["both"])
        plgpu.barrier_wait(r["both"])
    return wide


def _clean(plan, ref, first, size, keep):
    """Makes rows of tokens outside of the segment 0: 0 * NaN is NaN, and the slack of a page may hold any."""
    if keep is None:
        return
    token, begin, end = keep

    @pl.when((token + first < begin) | (token + first + size > end))
    def _():
        step = 32

        def zero(i, _):
            row = pl.multiple_of(first + i * step, step)
            at = plgpu.broadcasted_iota(jnp.int32, (step, 64), 0, layout=_PAIRS) + (token + row)
            for c in range(0, plan.head_dim, 64):
                piece = ref.at[pl.ds(row, step), pl.ds(c, 64)]
                value = load(piece, _PAIRS)
                piece[...] = jnp.where((at >= begin) & (at < end), value, jnp.zeros_like(value))

        lax.fori_loop(0, size // step, zero, None)
        plgpu.commit_smem()


def _store(plan: Plan, r: dict[str, Any], warpgroup: Any, place: Any, state: Any) -> None:
    """Stores a piece's result: normalized and its log-sum-exp, or as it is where ordered."""
    total, peak, weight = state
    seen = weight > 0
    if plan.ordered:
        r["peak"][place, warpgroup] = jnp.where(seen, peak, -jnp.inf)
        r["lse"][place, warpgroup] = weight
    else:
        safe = jnp.where(seen, weight, 1.0)
        lse = jnp.where(seen, peak + jnp.log(safe) * _LOG2E, -jnp.inf)
        inverse = 1.0 / safe
        total = total * lax.broadcast_in_dim(inverse, total.shape, [0])
        if not plan.split:
            r["lse"][place, warpgroup] = lse
    if not plan.split:
        r["out"][place, warpgroup] = total
        return
    # Few rows: through shared memory, so that no more than those are stored.
    rows = pl.ds(0, plan.rows)
    for i in range(0, plan.head_dim, 64):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        r["o_s"][warpgroup] = total[:, i : i + 64]
        if i == 0:
            r["lse_s"][warpgroup] = lse
        plgpu.commit_smem()
        to = r["out"].at[place, warpgroup, rows, pl.ds(i, 64)]
        plgpu.copy_smem_to_gmem(r["o_s"].at[warpgroup, rows], to)
        if i == 0:
            plgpu.copy_smem_to_gmem(r["lse_s"].at[warpgroup, rows], r["lse"].at[place, warpgroup, rows])


def _carried(plan: Plan, r: dict[str, Any], unit: Any, sheet: Any) -> Any:
    total = load(r["carry_total"].at[unit, sheet], _WGMMA)
    peak = load(r["carry_peak"].at[unit, sheet], _ROW)
    return total, jnp.maximum(peak, LOW), load(r["carry_weight"].at[unit, sheet], _ROW)
