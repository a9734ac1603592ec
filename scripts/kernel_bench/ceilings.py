"""What this device does at best, measured beside the kernels: copying memory, and a large product of matrices."""

from typing import Any

from kernel_bench.timing import TURN_SECONDS, Program, Timer, interleaved


def measure(platform: str, rounds: int = 5) -> dict[str, Any]:
    """Bytes/s of a copy (what is read and what is written both counted) and FLOP/s of a product.

    On a CPU both are smaller and in float32, so that it takes a second.
    """
    import jax
    import jax.numpy as jnp

    small = platform == "cpu"
    length, size = (2**25, 1024) if small else (2**30, 8192)
    dtype = jnp.float32 if small else jnp.bfloat16
    key = jax.random.key(0)
    array = jax.random.normal(key, (length // jnp.dtype(dtype).itemsize,), dtype)
    left, right = (jax.random.normal(k, (size, size), dtype) for k in jax.random.split(key))
    programs = [
        Program("copy", lambda x: -x, [(array,)]),
        Program("matmul", lambda x, y: x @ y, [(left, right), (right, left)]),
    ]
    results = interleaved([Timer(program, TURN_SECONDS[platform]) for program in programs], rounds)
    name = jnp.dtype(dtype).name
    return {
        "copy_bytes_per_second": 2 * length / results["copy"]["seconds"],
        "matmul_flops_per_second": 2 * size**3 / results["matmul"]["seconds"],
        "copy": f"{length / 2**20:.0f} MiB, negated",
        "matmul": f"{size} x {size} x {size}, {name}",
    }
