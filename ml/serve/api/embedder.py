"""Embeddings of texts: hidden states of a causal model, pooled and normalized."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from ml.models import Transformer, TransformerConfig
from ml.serve.placement import Placement, replica_meshes

_SHORTEST = 16


class Embedder:
    """Embeds texts, as token ids.

    An embedding is the mean of the final normed hidden states of all the text's tokens, or that of its last token,
    divided by its L2 norm. Each attends to those before it only: for plain language models the mean is the better
    choice; models that were trained to embed (most of them) say which they want.

    Rows and lengths are rounded up to powers of two, so that few programs are compiled.
    """

    def __init__(
        self,
        config: TransformerConfig,
        params: PyTree,
        *,
        pooling: Literal["mean", "last"] = "mean",
        dtype: Any = jnp.float32,
        token_budget: int = 4096,
        mesh: Mesh | None = None,
    ):
        """Keeps ``params`` as they are, in their places on the mesh.

        Args:
          config: the architecture.
          params: its parameters.
          pooling: what of a text counts.
          dtype: of activations.
          token_budget: most tokens, padding included, that are fed at once, unless one text has more.
          mesh: of the engine; a replica's devices are enough.
        """
        self._placement = Placement(config, None if mesh is None else replica_meshes(mesh)[0])
        self._model = Transformer(self._placement.config, dtype=dtype, place=self._placement.spec)
        self._params, self._budget = self._placement.params(params), token_budget
        self._pooling: Literal["mean", "last"] = pooling
        self._longest = config.max_length

    def embed(self, texts: Sequence[Sequence[int]]) -> Float[np.ndarray, "texts embed"]:
        """The embedding of each text; none may be empty or longer than the model's longest sequence."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: dict[int, np.ndarray] = {}
        while order:
            # The longest that is left says how wide the batch is.
            width = min(max(_SHORTEST, _power_of_two(len(texts[order[-1]]))), self._longest)
            rows = max(1, self._budget // width)
            batch = order[-rows:]
            del order[-rows:]
            tokens = np.zeros((_power_of_two(len(batch)), width), np.int32)
            lengths = np.ones(tokens.shape[0], np.int32)
            for row, i in enumerate(batch):
                tokens[row, : len(texts[i])], lengths[row] = texts[i], len(texts[i])
            with self._placement.context(), self._placement.launching():
                pooled = _embed(self._model, self._pooling, self._params, tokens, lengths)
            pooled = np.asarray(pooled)
            found.update(zip(batch, pooled, strict=False))
        return np.stack([found[i] for i in range(len(texts))])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed(
    model: Transformer,
    pooling: str,
    params: PyTree,
    tokens: Int[Array, "rows length"],
    lengths: Int[Array, " rows"],
) -> Float[Array, "rows embed"]:
    valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
    out: Any = model.apply({"params": params}, tokens, valid=valid)
    hidden = out[0].astype(jnp.float32)  # padding comes last, where no token of the text sees it
    if pooling == "mean":
        pooled = jnp.where(valid[..., None], hidden, 0).sum(axis=1) / lengths[:, None]
    else:
        pooled = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
