"""Runs the GPU kernels where there is no GPU, in Pallas's interpreter: slowly, to prove them, not to use them."""

import functools
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu


def params() -> Any:
    """What ``interpret=`` takes.

    Raises:
      NotImplementedError: before JAX 0.11, which has no interpreter of such kernels.
    """
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError(
            f"implementation='gpu' runs off a GPU only in the interpreter of JAX 0.11 and later, not {jax.__version__}"
        )
    _teach_accumulators()
    return plgpu.InterpretGPUParams()


@functools.cache
def _teach_accumulators() -> None:
    """The interpreter of JAX 0.11 can read a matmul's accumulator and add to it, but not set it: here it learns that.

    It keeps accumulators in buffers as any other memory, so that setting one is the swap that it does for those.
    """
    from jax._src.pallas.mosaic_gpu import primitives
    from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret
    from jax._src.state import primitives as state

    interpret = jaxpr_interpret.JaxprInterpreter.interpret

    def with_stores(self: Any, jaxpr: Any, token: Any, *args: Any) -> Any:
        def learned(eqn: Any) -> Any:
            if eqn.primitive is not primitives.wgmma_accumulator_store_p:
                return eqn
            return eqn.replace(primitive=state.swap_p, params={"tree": jax.tree.structure(())})

        if any(eqn.primitive is primitives.wgmma_accumulator_store_p for eqn in jaxpr.eqns):
            jaxpr = jaxpr.replace(eqns=[learned(eqn) for eqn in jaxpr.eqns])
        return interpret(self, jaxpr, token, *args)

    jaxpr_interpret.JaxprInterpreter.interpret = with_stores  # type: ignore[method-assign]
