"""Cases of flash attention: training and prefill shapes, forward alone and with the backward pass."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from kernel_bench import peers_torch
from kernel_bench.case import BenchCase, Built, add_peers, rotations
from kernel_bench.timing import Program
from pallas_kernels.flash_attention import cost
from pallas_kernels.roofline import Cost

# name -> (batch, length, heads, kv_heads, head_dim), and a window or the lengths of packed segments.
_ACCELERATOR: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "llama3_8b_8k": ((2, 8192, 32, 8, 128), {}),
    "llama3_8b_16k": ((1, 16384, 32, 8, 128), {}),
    "llama3_8b_16k_window_4k": ((1, 16384, 32, 8, 128), {"window": 4096}),
    "llama3_8b_16k_8_segments": ((1, 16384, 32, 8, 128), {"segments": [2048] * 8}),
    "head_64_8k": ((2, 8192, 32, 8, 64), {}),
    "head_256_8k": ((2, 8192, 16, 8, 256), {}),
    "llama3_8b_2k": ((8, 2048, 32, 8, 128), {}),
}
_CPU: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "small_512": ((1, 512, 8, 4, 64), {}),
    "small_1k": ((1, 1024, 8, 4, 64), {}),
    "small_1k_window_128": ((1, 1024, 8, 4, 64), {"window": 128}),
    "batch_4_of_256": ((4, 256, 8, 8, 64), {}),
    "head_128_2k": ((1, 2048, 8, 2, 128), {}),
}


def cases(platform: str, cache_bytes: float) -> Iterator[BenchCase]:
    """Those for a platform, the most telling first."""
    dtype = "float32" if platform == "cpu" else "bfloat16"
    for name, (shape, mask) in (_CPU if platform == "cpu" else _ACCELERATOR).items():
        for backward in (False, True):
            yield _case(name, shape, mask, backward, dtype, platform, cache_bytes)


def _case(
    name: str,
    shape: tuple[int, ...],
    mask: dict[str, Any],
    backward: bool,
    dtype: str,
    platform: str,
    cache_bytes: float,
) -> BenchCase:
    batch, length, heads, kv_heads, head_dim = shape
    pairs = batch * cost.segment_pairs(mask.get("segments", [length]), mask.get("window"))
    sizes = {"batch": batch, "queries": length, "keys": length, "heads": heads, "kv_heads": kv_heads}
    options: Any = sizes | {"head_dim": head_dim, "itemsize": 4 if dtype == "float32" else 2, "pairs": pairs}
    forward: Cost = cost.forward(**options)
    parts = (forward, cost.backward(**options)) if backward else ()
    return BenchCase(
        f"{name}/{'forward_backward' if backward else 'forward'}",
        {"batch": batch, "length": length, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, **mask}
        | {"dtype": dtype, "causal": True},
        parts[0] + parts[1] if parts else forward,
        dtype,
        functools.partial(_build, shape, mask, backward, dtype, platform, rotations(forward.bytes, cache_bytes)),
        parts,
    )


def _build(
    shape: tuple[int, ...], mask: dict[str, Any], backward: bool, dtype: str, platform: str, sets: int, peers: bool
) -> Built:
    import jax
    import jax.numpy as jnp

    batch, length, heads, kv_heads, head_dim = shape
    keys = jax.random.split(jax.random.key(0), (sets, 4))
    arrays = [
        tuple(
            jax.random.normal(key, (batch, length, count, head_dim), dtype)
            for key, count in zip(row, (heads, kv_heads, kv_heads, heads), strict=True)
        )[: 4 if backward else 3]
        for row in keys
    ]
    segments = None
    if "segments" in mask:
        ids = jnp.repeat(jnp.arange(len(mask["segments"])), jnp.array(mask["segments"]), total_repeat_length=length)
        segments = jnp.broadcast_to(ids.astype(jnp.int32), (batch, length))

    def attend(query: Any, key: Any, value: Any, *, implementation: Any) -> Any:
        from pallas_kernels.flash_attention import flash_attention

        options: dict[str, Any] = {"segment_ids": segments, "window": mask.get("window")}
        return flash_attention(query, key, value, **options, implementation=implementation)

    def program(name: str, implementation: str) -> Program:
        function = functools.partial(attend, implementation=implementation)
        return Program(name, _with_backward(function) if backward else function, arrays)

    programs = [program(f"ours/{name}", name) for name in (platform, "xla")]
    failed: dict[str, str] = {}
    if peers:
        candidates: dict[str, Any] = {}
        if platform == "gpu" and "segments" not in mask:  # cuDNN would be given a dense mask, of length squared
            candidates["cudnn"] = lambda: program("cudnn", "cudnn")
        if platform == "tpu":
            candidates["splash"] = lambda: program("splash", "splash")
        if peers_torch.available():
            candidates |= _torch_peers(arrays, mask, backward, platform)
        add_peers(programs, failed, candidates)
    ours, theirs = (_joined, _turned_and_joined) if backward else (lambda x: x, _turn)
    return Built(programs, {p.name: theirs if p.framework == "torch" else ours for p in programs}, failed)


def _with_backward(function: Any) -> Any:
    import jax

    def both(query: Any, key: Any, value: Any, gradient: Any) -> Any:
        _, pull = jax.vjp(function, query, key, value)
        return pull(gradient)

    return both


def _torch_peers(arrays: list, mask: Mapping[str, Any], backward: bool, platform: str) -> dict[str, Any]:
    def turned() -> list:
        return [tuple(array.swapaxes(1, 2) for array in arguments) for arguments in arrays]

    gqa = arrays[0][0].shape[2] != arrays[0][1].shape[2]
    make = peers_torch.sdpa_backward if backward else peers_torch.sdpa
    peers: dict[str, Any] = {}
    if not mask:
        peers["torch/sdpa"] = lambda: make("torch/sdpa", turned(), is_causal=True, enable_gqa=gqa)
    if platform == "gpu" and not backward:
        length = arrays[0][0].shape[1]
        peers["torch/flex"] = lambda: peers_torch.flex("torch/flex", turned(), _torch_mask(mask, length), length)
    return peers


def _torch_mask(mask: Mapping[str, Any], length: int) -> Any:
    import torch

    window = mask.get("window", length)
    lengths = torch.tensor(mask.get("segments", [length]))
    ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to("cuda")

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (query - key < window) & (ids[query] == ids[key])

    return sees


def _joined(gradients: Any) -> Any:
    """Those of query, key and value in one array."""
    import jax.numpy as jnp

    return jnp.concatenate([x.reshape(-1) for x in gradients])


def _turned_and_joined(gradients: Any) -> Any:
    import torch

    return torch.cat([_turn(x).reshape(-1) for x in gradients])


def _turn(out: Any) -> Any:
    return out.transpose(1, 2)
