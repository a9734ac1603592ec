"""Whether the assembler corrupts products whose left operand lies in registers.

Assemblers of CUDA before 13.3 may (Triton pull request 11781, issue 9433). Small whole numbers have exact products in
bfloat16 with float32 sums, so any difference is an error. The operand is made anew in registers in every step, as an
attention kernel makes its weights, while the product of the step before is under way.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

_ROWS, _DEPTH, _COLUMNS, _STEPS = 64, 64, 128, 16


def assemblers() -> dict[str, str]:
    """Paths and versions of the ptxas that JAX may find: of NVIDIA's wheels, or on the PATH."""
    import importlib.util

    paths = [shutil.which("ptxas"), shutil.which("/usr/local/cuda/bin/ptxas")]
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        paths += [str(path) for path in Path(folder).glob("*/bin/ptxas")]
    found = {}
    for path in filter(None, paths):
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        version = re.search(r"release [\d.]+, V([\d.]+)", done.stdout)
        found[path] = version.group(1) if version else "unknown"
    return found


def product(left: Any, right: Any) -> Any:
    """``sum_s (left[s] + s) @ right[s]``: ``[steps, 64, 64]`` by ``[steps, 64, 128]``; the sum ``+ s`` in registers."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tiles: Any = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]

    def kernel(left: Any, right: Any, out: Any, left_tile: Any, right_tile: Any, out_tile: Any, arrived: Any) -> None:
        def multiply(sums: Any) -> Any:
            def step(s: Any, _: None) -> None:
                slot = jax.lax.rem(s, jnp.int32(2))
                plgpu.copy_gmem_to_smem(left.at[s], left_tile.at[slot], arrived)
                plgpu.copy_gmem_to_smem(right.at[s], right_tile.at[slot], arrived)
                plgpu.barrier_wait(arrived)
                operand = plgpu.load(left_tile.at[slot], layout=plgpu.Layout.WGMMA)
                shifted = (operand.astype(jnp.float32) + s.astype(jnp.float32)).astype(jnp.bfloat16)
                plgpu.wgmma(sums, shifted, right_tile.at[slot])
                plgpu.wgmma_wait(1)  # the step before is done, so its slot may be filled again

            jax.lax.fori_loop(0, _STEPS, step, None)
            return sums[...]

        out_tile[...] = pl.run_scoped(multiply, plgpu.ACC((_ROWS, _COLUMNS), jnp.float32))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile, out)
        plgpu.wait_smem_to_gmem(0)

    names = plgpu.kernel.__code__.co_varnames
    out = jax.ShapeDtypeStruct((_ROWS, _COLUMNS), jnp.float32)
    scratch = [
        plgpu.SMEM((2, _ROWS, _DEPTH), jnp.bfloat16, transforms=tiles),
        plgpu.SMEM((2, _DEPTH, _COLUMNS), jnp.bfloat16, transforms=tiles),
        plgpu.SMEM((_ROWS, _COLUMNS), jnp.float32),
        plgpu.Barrier(num_arrivals=2),
    ]
    options: Any = {
        "out_type" if "out_type" in names else "out_shape": out,
        "scratch_types" if "scratch_types" in names else "scratch_shapes": scratch,
    }
    return plgpu.kernel(kernel, **options, kernel_name="register_operand")(left, right)


def operands(seed: int) -> tuple[Any, Any]:
    """Random whole numbers, small enough that everything is exact."""
    import jax
    import jax.numpy as jnp

    left, right = jax.random.split(jax.random.key(seed))
    return (
        jax.random.randint(left, (_STEPS, _ROWS, _DEPTH), -8, 9).astype(jnp.bfloat16),
        jax.random.randint(right, (_STEPS, _DEPTH, _COLUMNS), -8, 9).astype(jnp.bfloat16),
    )


def expected(left: Any, right: Any) -> Any:
    """The same in float64, on the host."""
    import numpy as np

    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    return ((left + np.arange(len(left))[:, None, None]) @ right).sum(axis=0)


def wrong_elements(trials: int = 20) -> int:
    """Number of wrong elements over some random operands; needs a Hopper GPU."""
    import jax
    import numpy as np

    compiled = jax.jit(product)
    wrong = 0
    for seed in range(trials):
        pair = operands(seed)
        wrong += int((np.asarray(compiled(*pair), np.float64) != expected(*pair)).sum())
    return wrong
