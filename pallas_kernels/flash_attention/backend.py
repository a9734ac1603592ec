"""What a platform supplies: the forward and the backward pass over interval masks, each on one device's arrays."""

from typing import Any, Protocol

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


class Backend(Protocol):
    """A module of this package (``xla``, ``cpu``, ``gpu``, ``tpu``).

    Arrays lie on one device and may have any length: padding and clipping are the backend's. Query heads
    ``g * n .. g * n + n - 1`` share key/value head ``g``. The batch of intervals, which are explained in
    `pallas_kernels.flash_attention.intervals`, may be 1. A row that sees nothing has output 0, log-sum-exp -inf and
    gradient 0. Sums are in float32.
    """

    @staticmethod
    def why_not(query: Any, key: Any, value: Any, *, softcap: float | None, config: Any) -> str | None:
        """A sentence that names the argument for which the case is not supported; ``None``: it is."""
        ...

    @staticmethod
    def forward(
        query: Float[Array, "batch queries heads head_dim"],
        key: Float[Array, "batch keys kv_heads head_dim"],
        value: Float[Array, "batch keys kv_heads head_dim"],
        intervals: Int[Array, "batch queries 2"],
        *,
        scale: float,
        softcap: float | None,
        out_dtype: DTypeLike | None = None,
        config: Any = None,
    ) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch queries heads"]]:
        """Attends.

        Args:
          query, key, value, intervals: see above.
          scale: multiplier on logits.
          softcap: ``softcap * tanh(logit / softcap)`` before the mask, or ``None``.
          out_dtype: of the output; ``None``: the query's.
          config: the backend's own dataclass; ``None``: its heuristic, or the tuning table.

        Returns:
          The output and the float32 natural logarithm of each row's sum of exponentiated logits.
        """
        ...

    @staticmethod
    def backward(
        query: Float[Array, "batch queries heads head_dim"],
        key: Float[Array, "batch keys kv_heads head_dim"],
        value: Float[Array, "batch keys kv_heads head_dim"],
        lse: Float[Array, "batch queries heads"],
        delta: Float[Array, "batch queries heads"],
        out_gradient: Float[Array, "batch queries heads head_dim"],
        intervals: Int[Array, "batch queries 2"],
        *,
        scale: float,
        softcap: float | None,
        out_dtype: DTypeLike | None = None,
        config: Any = None,
    ) -> tuple[
        Float[Array, "batch queries heads head_dim"],
        Float[Array, "batch keys kv_heads head_dim"],
        Float[Array, "batch keys kv_heads head_dim"],
    ]:
        """The gradients of query, key and value; the same bits every time.

        Args:
          query, key, value, intervals, scale, softcap, config: as in `forward`.
          lse: of all keys that a row sees, of which these may be a part: probabilities are ``exp(logit - lse)``.
          delta: ``rowsum(out * out_gradient) - lse_gradient``, float32; the gradient of a logit is its probability
            times ``out_gradient . value - delta``.
          out_gradient: of the output.
          out_dtype: of the results; ``None``: those of query, key and value.
        """
        ...
