"""Which module an architecture is, and its parameters: made, named, and the part that the output layer reads."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ml.models.attention import SelfAttention
from ml.models.bert import Bert
from ml.models.config import TransformerConfig
from ml.models.parameters import LogicalAxes, unplaced
from ml.models.transformer import Transformer

Model = Transformer | Bert


def module_of(config: TransformerConfig, **fields: Any) -> Any:
    """The module of this architecture, `Transformer` or `Bert`.

    Args:
      config: the architecture.
      fields: the module's other attributes: ``dtype``, ``remat``, ``place``, an encoder's ``dropout``.
    """
    return (Transformer if config.encoder is None else Bert)(config, **fields)


def init_params(model: Model, key: jax.Array) -> PyTree:
    """Random float32 parameters, unboxed. Jit it with ``out_shardings`` to create shards only."""
    return nn.meta.unbox(_init(model, key))


def logical_axes(config: TransformerConfig) -> PyTree[tuple[str, ...]]:
    """The logical axis names of every parameter: a tree like ``params`` whose leaves are tuples of names."""
    boxed = jax.eval_shape(lambda: _init(module_of(config), jax.random.key(0)))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=lambda x: isinstance(x, LogicalAxes))


def head_params(config: TransformerConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The part of ``params`` that the model's ``logits`` reads."""
    if config.encoder is not None:
        return {name: params[name] for name in ("embed", "mlm_dense", "mlm_norm", "mlm_output")}
    name = "embed" if config.tie_embeddings else "unembed"
    return {name: params[name]}


def _init(model: Model, key: jax.Array) -> PyTree:
    # Off any mesh and at length 1: shapes of parameters do not depend on the input.
    bare = model.clone(place=unplaced)
    tokens = jnp.zeros((1, 1), jnp.int32)
    strategy = SelfAttention(implementation="xla", causal=model.config.encoder is None)
    return bare.init(key, tokens, strategy, method="forward")["params"]
