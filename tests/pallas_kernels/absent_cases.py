"""Programs that `test_absent.py` compiles: kernels of known shape, and what must not bring the others down."""

import os

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cases import Case
from pallas_kernels.platform import chip, platform


def _square(size, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((size, size), dtype)


def _tpu_product(x, y):
    """One block of 256 rows at a time, all of the contraction in one step."""
    assert (platform(), chip()) == ("tpu", "TPU v5 lite"), "the program does not know what it is for"

    def kernel(x, y, out):
        out[...] = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

    n = x.shape[0]
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((n, n), jnp.float32),
        grid=(n // 256,),
        in_specs=[pl.BlockSpec((256, n), lambda i: (i, 0)), pl.BlockSpec((n, n), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((256, n), lambda i: (i, 0)),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=2**26),
        name="product",
    )(x, y)


def _gpu_product(x, y):
    """One tile of 64 by 128, from shared memory to shared memory."""
    assert (platform(), chip()) == ("gpu", "NVIDIA H200"), "the program does not know what it is for"
    tiles = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def kernel(x, y, out, x_tile, y_tile, out_tile, barrier):
        plgpu.copy_gmem_to_smem(x, x_tile, barrier)
        plgpu.copy_gmem_to_smem(y, y_tile, barrier)
        plgpu.barrier_wait(barrier)

        def multiply(sums):
            plgpu.wgmma(sums, x_tile, y_tile)
            return sums[...]

        out_tile[...] = pl.run_scoped(multiply, plgpu.ACC((64, 128), jnp.float32)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile, out)
        plgpu.wait_smem_to_gmem(0)

    out = jax.ShapeDtypeStruct((64, 128), jnp.bfloat16)
    name = "out_type" if "out_type" in plgpu.kernel.__code__.co_varnames else "out_shape"
    scratch = "scratch_types" if "scratch_types" in plgpu.kernel.__code__.co_varnames else "scratch_shapes"
    shared = [plgpu.SMEM(shape, jnp.bfloat16, transforms=tiles) for shape in ((64, 64), (64, 128), (64, 128))]
    options = {name: out, scratch: [*shared, plgpu.Barrier(num_arrivals=2)]}
    return plgpu.kernel(kernel, **options, kernel_name="product")(x, y)


TPU_PRODUCT = Case("tpu", _tpu_product, (_square(1024), _square(1024)))
GPU_PRODUCT = Case(
    "gpu",
    _gpu_product,
    (jax.ShapeDtypeStruct((64, 64), jnp.bfloat16), jax.ShapeDtypeStruct((64, 128), jnp.bfloat16)),
)
WRONG = Case("wrong", lambda x: x + jnp.zeros((3, 3)), (_square(8),))
ABORTS = Case("aborts", lambda x: os._exit(86), (_square(8),))
