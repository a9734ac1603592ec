"""The derivative of attention, once for all backends."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.flash_attention.backend import Backend
from pallas_kernels.flash_attention.intervals import Band
from pallas_kernels.sharded import on_shards


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static in a call; hashable.

    Attributes:
      backend: see `Backend`; a module.
      scale, softcap, config: its keyword arguments.
      band: likewise, for the one backend that takes it; ``None``: not given.
      opaque: its kernels know nothing of sharding, so each device is given its own part.
    """

    backend: Backend
    scale: float
    softcap: float | None
    config: Any = None
    opaque: bool = False
    band: Band | None = None

    def run(self, name: str, operands: tuple[Any, ...], out_like: Any) -> Any:
        """The backend's ``forward`` or ``backward`` on the operands."""
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap, "config": self.config}
        if self.band is not None:
            options["band"] = self.band
        function = functools.partial(getattr(self.backend, name), **options)
        return on_shards(function, operands, out_like) if self.opaque else function(*operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(call: Call, query, key, value, intervals) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp, both differentiable with respect to query, key and value; see `Backend.forward`."""
    # query[..., 0] is cut as the log-sum-exp is.
    return call.run("forward", (query, key, value, intervals), (query, query[..., 0]))


def row_delta(
    out: Float[Array, "batch queries heads head_dim"],
    out_gradient: Float[Array, "batch queries heads head_dim"],
    lse_gradient: Float[Array, "batch queries heads"] | None = None,
) -> Float[Array, "batch queries heads"]:
    """What the gradient of every logit of a row has subtracted: ``rowsum(out * out_gradient) - lse_gradient``.

    With probabilities P and dP = dO V^T the Jacobian of softmax gives dS = P * (dP - rowsum(O * dO)) (Dao et al. 2022,
    appendix B.2); the log-sum-exp has derivative P, so that its gradient joins in the same place.
    """
    delta = jnp.sum(out.astype(jnp.float32) * out_gradient.astype(jnp.float32), axis=-1)
    return delta if lse_gradient is None else delta - lse_gradient


def _forward(call: Call, query, key, value, intervals):
    out, lse = attend(call, query, key, value, intervals)
    return (out, lse), (query, key, value, intervals, out, lse)


def _backward(call: Call, saved, gradients):
    query, key, value, intervals, out, lse = saved
    out_gradient, lse_gradient = gradients
    delta = row_delta(out, out_gradient, lse_gradient)
    operands = (query, key, value, lse, delta, out_gradient, intervals)
    return *call.run("backward", operands, (query, key, value)), None


attend.defvjp(_forward, _backward)
