"""Which module an architecture is, and its variables: made, named, and the part that the output layer reads."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ml.models import cost, resnet_cost, two_tower_cost
from ml.models.attention import SelfAttention
from ml.models.bert import Bert
from ml.models.config import TransformerConfig
from ml.models.parameters import LogicalAxes, unplaced
from ml.models.resnet import ResNet
from ml.models.resnet_config import ResNetConfig
from ml.models.transformer import Transformer
from ml.models.two_tower import TwoTower
from ml.models.two_tower_config import TwoTowerConfig

ModelConfig = TransformerConfig | ResNetConfig | TwoTowerConfig
Model = Transformer | Bert | ResNet | TwoTower


def _transformer_variables(model: Transformer | Bert, key: jax.Array) -> PyTree:
    # At length 1: shapes of parameters do not depend on the input.
    tokens = jnp.zeros((1, 1), jnp.int32)
    strategy = SelfAttention(implementation="xla", causal=model.config.encoder is None)
    return model.init(key, tokens, strategy, method="forward")


def _resnet_variables(model: ResNet, key: jax.Array) -> PyTree:
    return model.init(key, jnp.zeros((1, 32, 32, model.config.channels)))


def _two_tower_variables(model: TwoTower, key: jax.Array) -> PyTree:
    image = model.config.image
    pixels = jnp.zeros((1, image.image_size, image.image_size, image.channels))
    return model.clone(attention="xla").init(key, pixels, jnp.zeros((1, 1), jnp.int32))


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """What is to be known of a kind of architecture.

    Attributes:
      module: its module's class.
      variables: ``(module off any mesh, key) -> variables``, parameters in their boxes.
      parameters: how many there are.
    """

    module: Callable[[Any], type[nn.Module]]
    variables: Callable[[Any, jax.Array], PyTree]
    parameters: Callable[[Any], cost.ParameterCount]


_ARCHITECTURES: Mapping[type, _Architecture] = {
    TransformerConfig: _Architecture(
        lambda c: Transformer if c.encoder is None else Bert, _transformer_variables, cost.parameter_count
    ),
    ResNetConfig: _Architecture(lambda c: ResNet, _resnet_variables, resnet_cost.parameter_count),
    TwoTowerConfig: _Architecture(lambda c: TwoTower, _two_tower_variables, two_tower_cost.parameter_count),
}


def module_of(config: ModelConfig, **fields: Any) -> Any:
    """The module of this architecture: `Transformer`, `Bert`, `ResNet`, `TwoTower`.

    Args:
      config: the architecture.
      fields: the module's other attributes: ``dtype``, ``remat``, ``place``, an encoder's ``dropout``.
    """
    return _ARCHITECTURES[type(config)].module(config)(config, **fields)


def init_params(model: Model, key: jax.Array) -> PyTree:
    """Random float32 parameters, unboxed. Jit it with ``out_shardings`` to create shards only."""
    return nn.meta.unbox(_init(model, key)["params"])


def init_model_state(model: Model) -> dict[str, PyTree]:
    """What a model carries from step to step besides its parameters, by collection; empty for most.

    Of a network with batch norm that is ``batch_stats``, its running statistics.
    """
    return {name: value for name, value in _init(model, jax.random.key(0)).items() if name != "params"}


def logical_axes(config: ModelConfig) -> PyTree[tuple[str, ...]]:
    """The logical axis names of every parameter: a tree like ``params`` whose leaves are tuples of names."""
    boxed = jax.eval_shape(lambda: _init(module_of(config), jax.random.key(0))["params"])
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=lambda x: isinstance(x, LogicalAxes))


def num_parameters(config: ModelConfig) -> int:
    """How many parameters `init_params` makes."""
    return _ARCHITECTURES[type(config)].parameters(config).total


def head_params(config: TransformerConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The part of ``params`` that the model's ``logits`` reads."""
    if config.encoder is not None:
        return {name: params[name] for name in ("embed", "mlm_dense", "mlm_norm", "mlm_output")}
    name = "embed" if config.tie_embeddings else "unembed"
    return {name: params[name]}


def _init(model: Model, key: jax.Array) -> PyTree:
    return _ARCHITECTURES[type(model.config)].variables(model.clone(place=unplaced), key)
