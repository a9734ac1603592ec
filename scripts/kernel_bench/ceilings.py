"""What this device does at best, measured beside the kernels: moving memory, and a large product of matrices."""

from typing import Any

from kernel_bench.timing import TURN_SECONDS, Program, Timer, interleaved
from pallas_kernels.chips import chip_of


def measure(platform: str, rounds: int = 5) -> dict[str, Any]:
    """Bytes/s of a copy (what is read and what is written both counted) and FLOP/s of a product.

    On a CPU memory is read alone, since fresh results cost it page faults, and both are small and in float32.

    Raises:
      RuntimeError: memory is faster than the data sheet has it, so something was not measured.
    """
    import jax
    import jax.numpy as jnp

    cpu = platform == "cpu"
    length, size, dtype = (2**27, 1024, jnp.float32) if cpu else (2**30, 8192, jnp.bfloat16)
    key = jax.random.key(0)
    array = jax.random.normal(key, (length // jnp.dtype(dtype).itemsize // 1024, 1024), dtype)
    left, right = (jax.random.normal(k, (size, size), dtype) for k in jax.random.split(key))
    programs = [
        Program("memory", (lambda x: x.sum(axis=1)) if cpu else (lambda x: -x), [(array,)]),
        Program("matmul", lambda x, y: x @ y, [(left, right), (right, left)]),
    ]
    results = interleaved([Timer(program, TURN_SECONDS[platform]) for program in programs], rounds)
    moved = (1 if cpu else 2) * length / results["memory"]["seconds"]
    chip = chip_of(jax.devices()[0].device_kind)
    if chip is not None and moved > 1.1 * chip.memory_bandwidth:
        raise RuntimeError(f"{length} bytes were moved at {moved:.3g} bytes/s, faster than this memory can be")
    return {
        "memory_bytes_per_second": moved,
        "matmul_flops_per_second": 2 * size**3 / results["matmul"]["seconds"],
        "memory": f"{length / 2**20:.0f} MiB, {'rows summed' if cpu else 'negated into as many'}",
        "matmul": f"{size} x {size} x {size}, {jnp.dtype(dtype).name}",
    }
