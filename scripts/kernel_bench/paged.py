"""Cases of paged attention: decoding, with even and with very uneven lengths, and prefill chunks among decodes."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from kernel_bench import peers_torch
from kernel_bench.case import BenchCase, Built, add_peers, rotations
from kernel_bench.timing import Program
from pallas_kernels.paged_attention.cost import cost


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch: its sequences, the model and its cache."""

    lengths: tuple[int, ...]
    query_lengths: tuple[int, ...] | None = None
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"

    @property
    def even(self) -> bool:
        """All sequences have the same length and one new token."""
        return len(set(self.lengths)) == 1 and self.query_lengths is None

    @property
    def quantized(self) -> bool:
        """The cache has scales."""
        return self.cache_dtype in ("int8", "float8_e4m3fn")


def _skewed(batch: int, total: int) -> tuple[int, ...]:
    """One sequence in twelve is 100 times as long as the others."""
    long = max(1, batch // 12)
    short = total // (100 * long + batch - long)
    return tuple(100 * short if i < long else short for i in range(batch))


_ACCELERATOR = {
    "decode_64x8k": Shape((8192,) * 64),
    "decode_64_skewed_100_to_1": Shape(_skewed(64, 64 * 8192)),
    "decode_8x2k": Shape((2048,) * 8),
    "decode_64x8k_int8": Shape((8192,) * 64, cache_dtype="int8"),
    "decode_64x8k_float8": Shape((8192,) * 64, cache_dtype="float8_e4m3fn"),
    "ragged_8_chunks_of_512_and_56_decodes": Shape((8192,) * 64, (512,) * 8 + (1,) * 56),
    "decode_256x1k": Shape((1024,) * 256),
    "decode_64x8k_page_16": Shape((8192,) * 64, page_size=16),
    "decode_64x8k_llama3_70b_eighth": Shape((8192,) * 64, heads=8, kv_heads=1),
    "prefill_1x8k": Shape((8192,), (8192,)),
}


def _cpu() -> dict[str, Shape]:
    float32: Any = {"dtype": "float32", "cache_dtype": "float32"}
    mha: Any = float32 | {"heads": 8, "kv_heads": 8, "head_dim": 64}
    grouped = {
        f"decode_{batch}x{length}_gqa": Shape((length,) * batch, **float32)
        for batch, length in ((1, 1024), (1, 4096), (16, 1024), (64, 256))
    }
    plain = {
        f"decode_{batch}x{length}": Shape((length,) * batch, **mha)
        for batch in (1, 4, 16, 64)
        for length in (256, 1024, 4096)
    }
    return grouped | plain | {"decode_16_skewed": Shape(_skewed(16, 16 * 1024), **mha)}


def cases(platform: str, cache_bytes: float) -> Iterator[BenchCase]:
    """Those for a platform, the most telling first."""
    for name, shape in (_cpu() if platform == "cpu" else _ACCELERATOR).items():
        yield bench_case(name, shape, platform, cache_bytes)


def bench_case(name: str, shape: Shape, platform: str, cache_bytes: float) -> BenchCase:
    """The case of a shape."""
    least = cost_of(shape)
    settings = dataclasses.asdict(shape) | {"lengths": _short(shape.lengths), "sequences": len(shape.lengths)}
    settings["query_lengths"] = 1 if shape.query_lengths is None else _short(shape.query_lengths)
    layers = rotations(least.bytes, cache_bytes)
    build = functools.partial(_build, shape, platform, layers)
    return BenchCase(name, settings | {"layers": layers}, least, shape.dtype, build)


def cost_of(shape: Shape) -> Any:
    """The roofline of a shape."""
    import jax.numpy as jnp

    return cost(
        shape.lengths,
        shape.query_lengths,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        itemsize=jnp.dtype(shape.dtype).itemsize,
        cache_itemsize=jnp.dtype(shape.cache_dtype).itemsize,
        quantized=shape.quantized,
    )


def _short(lengths: tuple[int, ...]) -> Any:
    return lengths[0] if len(set(lengths)) == 1 else list(lengths)


def make_cache(shape: Shape, layers: int, pages: int) -> Any:
    """Random keys and values, quantized row by row where the type wants it."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.paged_attention import PagedCache, quantize

    whole = (pages, shape.page_size, shape.kv_heads, shape.head_dim)

    @jax.jit
    def layer(key: Any) -> tuple:
        arrays: list[Any] = []
        for part in jax.random.split(key):
            values = jax.random.normal(part, whole, jnp.bfloat16 if shape.quantized else shape.cache_dtype)
            if shape.quantized:
                values, scale = quantize(values, shape.cache_dtype)
                arrays += [values, scale.swapaxes(1, 2)]
            else:
                arrays += [values, None]
        return tuple(arrays)

    made = [layer(key) for key in jax.random.split(jax.random.key(1), layers)]
    key, key_scale, value, value_scale = jax.tree.map(lambda *xs: jnp.stack(xs), *made)
    return PagedCache(key, value, key_scale, value_scale)


def tables(shape: Shape) -> tuple[np.ndarray, int]:
    """A block table whose pages lie in random order, and the number of pages."""
    counts = [-(-length // shape.page_size) for length in shape.lengths]
    pages = np.random.default_rng(0).permutation(sum(counts)).astype(np.int32)
    table = np.zeros((len(counts), max(counts)), np.int32)
    for row, (end, count) in enumerate(zip(np.cumsum(counts), counts, strict=True)):
        table[row, :count] = pages[end - count : end]
    return table, sum(counts)


def _build(shape: Shape, platform: str, layers: int, peers: bool) -> Built:
    import jax
    import jax.numpy as jnp

    table, pages = tables(shape)
    cache = make_cache(shape, layers, pages)
    rows = len(shape.lengths) if shape.query_lengths is None else sum(shape.query_lengths)
    query = jax.random.normal(jax.random.key(2), (rows, shape.heads, shape.head_dim), shape.dtype)
    lengths = jnp.array(shape.lengths, jnp.int32)
    starts = None
    if shape.query_lengths is not None:
        starts = jnp.array(np.concatenate([[0], np.cumsum(shape.query_lengths)]), jnp.int32)
    block_table = jnp.array(table)
    sets = [(query, cache, jnp.int32(layer), block_table, lengths, starts) for layer in range(layers)]

    def program(name: str, **options: Any) -> Program:
        def attend(query: Any, cache: Any, layer: Any, block_table: Any, lengths: Any, starts: Any) -> Any:
            from pallas_kernels.paged_attention import paged_attention

            return paged_attention(query, cache, layer, block_table, lengths, starts, **options)

        return Program(name, attend, sets)

    own = [platform, "xla"]
    programs = [program(f"ours/{name}", implementation=name) for name in own]
    programs.append(program("ours/invariant", implementation=own[0], invariant=True))
    failed: dict[str, str] = {}
    outputs: dict[str, Any] = {program.name: lambda x: x for program in programs}
    if peers and not shape.quantized and shape.query_lengths is None:
        candidates: dict[str, Any] = {}
        if platform == "gpu":
            candidates["cudnn_paged"] = lambda: _cudnn_paged(sets)
        if shape.even:
            copies = functools.cache(lambda: [contiguous(shape, *arguments[:4]) for arguments in sets])
            candidates["dense"] = lambda: Program("dense", _dense, copies())
            if peers_torch.available():
                candidates["torch/sdpa"] = lambda: peers_torch.sdpa("torch/sdpa", copies())
        add_peers(programs, failed, candidates)
        flat = (rows, shape.heads, shape.head_dim)
        outputs |= {name: lambda x: x.reshape(flat) for name in ("dense", "torch/sdpa", "cudnn_paged")}
    return Built(programs, outputs, failed)


def contiguous(shape: Shape, query: Any, cache: Any, layer: Any, block_table: Any) -> tuple:
    """Query with the heads of a group as its rows, and keys and values ``[batch, kv_heads, tokens, head_dim]``."""

    def gather(pages: Any) -> Any:
        chosen = pages[layer][block_table]
        batch, count, page_size, heads, head_dim = chosen.shape
        chosen = chosen.reshape(batch, count * page_size, heads, head_dim)[:, : shape.lengths[0]]
        return chosen.swapaxes(1, 2)

    folded = query.reshape(len(shape.lengths), shape.kv_heads, -1, shape.head_dim)
    return folded, gather(cache.key), gather(cache.value)


def _dense(query: Any, key: Any, value: Any) -> Any:
    """The plain product with all keys, a mask over them (here all are seen), softmax, and the product with values."""
    import jax
    import jax.numpy as jnp

    logits = jnp.einsum("bkgd,bktd->bkgt", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    mask = jnp.arange(key.shape[2]) < key.shape[2]
    weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1).astype(value.dtype)
    return jnp.einsum("bkgt,bktd->bkgd", weights, value)


def _cudnn_paged(sets: list) -> Program:
    """cuDNN's paged attention as JAX calls it; its private entry point, for it has no other."""
    import jax.numpy as jnp
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, paged_attention

    def attend(query: Any, key: Any, value: Any, rows: Any, lengths: Any, table: Any) -> Any:
        scale = query.shape[-1] ** -0.5
        mask: Any = MaskType.PADDING
        return paged_attention(query, key, value, rows, lengths, table, table, scale=scale, mask_type=mask)

    changed = []
    for query, cache, layer, block_table, lengths, _ in sets:
        table = block_table[:, None, :, None]
        rows = jnp.ones_like(lengths)
        changed.append((query[:, None], cache.key[layer], cache.value[layer], rows, lengths, table))
    return Program("cudnn_paged", attend, changed)
