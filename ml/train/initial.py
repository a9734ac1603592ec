"""A run that starts from another model (``config.train.init_from``): what must be equal, and what is made anew."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

from ml.checkpoint.pretrained import (
    leaf_path,
    load_model,
    load_model_config,
    load_resnet,
    load_resnet_config,
    load_two_tower,
    load_two_tower_config,
)
from ml.config import to_dict
from ml.errors import UserError
from ml.models import MoEConfig, TransformerConfig, init_params, logical_axes, module_of
from ml.train.state import AVERAGED, RUNNING

# The `ml.train.setup.Parts` of a run, which are made from the kinds of models that are here.
Parts = Any
Initial = tuple[dict[str, Any], dict[str, Any] | None]
"""Parameters, placed on the mesh, and the running statistics that belong to them (``None``: there are none)."""


def initial_transformer(parts: Parts) -> Initial:
    """Parameters of another run or of a Hugging Face folder; an encoder's heads are made anew for another task.

    Raises:
      UserError: another architecture, or no tokenizer is given.
    """
    source, wanted = _named(parts)
    _check_tokenizer(parts)
    found = load_model_config(source)
    comparable = found
    if found.encoder and wanted.encoder:
        task = {name: getattr(wanted.encoder, name) for name in ("num_classes", "pooling")}
        encoder = dataclasses.replace(found.encoder, **task)
        comparable = dataclasses.replace(found, encoder=encoder)
    harmless = {"init_stddev"} if wanted.position_embedding == "learned" else {"init_stddev", "max_length"}
    _check_same(comparable, wanted, source, harmless, _untrained)
    params = load_model(source, dtype=jnp.float32, sharding=_places(found, parts))[1]
    return params if found.encoder == wanted.encoder else _with_new_heads(params, parts), None


def initial_two_tower(parts: Parts) -> Initial:
    """Parameters of another run, or of a CLIP in a Hugging Face folder.

    Raises:
      UserError: another architecture, or no tokenizer is given.
    """
    source, wanted = _named(parts)
    _check_tokenizer(parts)
    found = load_two_tower_config(source)
    _check_same(found, wanted, source, {"temperature"})  # the learned one is among the parameters
    return load_two_tower(source, dtype=jnp.float32, sharding=_places(found, parts))[1], None


def initial_resnet(parts: Parts) -> Initial:
    """Parameters and running statistics of another run; the last layer is made anew for other classes.

    Raises:
      UserError: another architecture.
    """
    source, wanted = _named(parts)
    found = load_resnet_config(source)
    _check_same(found, wanted, source, {"num_classes", "zero_init", "batch_norm_group", "batch_norm_momentum"})
    params, model_state = load_resnet(source, dtype=jnp.float32, sharding=_places(found, parts))[1:]
    statistics = model_state.get(AVERAGED, model_state[RUNNING])  # those of the parameters, which may be an average too
    return params if found.num_classes == wanted.num_classes else _with_new_heads(params, parts), statistics


def _named(parts: Parts) -> tuple[str, Any]:
    return parts.config.train.init_from, parts.config.model


def _check_tokenizer(parts: Parts) -> None:
    source, config = parts.config.train.init_from, parts.config
    if not config.data.tokenizer.path:
        raise UserError(f"config.train.init_from={source} needs its own tokenizer: set config.data.tokenizer.path too")


def _check_same(
    found: Any,
    wanted: Any,
    source: str,
    harmless: Collection[str],
    compared: Callable[[Any], Any] = lambda config: config,
) -> None:
    """Refuses a difference in what ``compared`` leaves of the architectures, and shows them whole."""
    left, right = to_dict(found), to_dict(wanted)
    for name in left:
        if getattr(compared(found), name) != getattr(compared(wanted), name) and name not in harmless:
            raise UserError(
                f"config.train.init_from={source} has {name}={left[name]}, but config.model.{name}={right[name]}; "
                "make them equal"
            )


def _untrained(config: TransformerConfig) -> TransformerConfig:
    """The model without the settings that say how its experts are trained, other than whether they have a bias."""
    if config.moe is None:
        return config
    kept = {name: getattr(config.moe, name) for name in ("num_experts", "top_k", "mlp_dim", "normalize_top_k")}
    return dataclasses.replace(config, moe=MoEConfig(**kept, bias_update_rate=float(config.moe.bias_update_rate > 0)))


def _places(found: Any, parts: Parts) -> Callable[[str], jax.sharding.Sharding]:
    """Where each of the found model's parameters goes, by its path."""
    shapes = jax.eval_shape(lambda: init_params(module_of(found), jax.random.key(0)))
    shardings = parts.rules.shardings(logical_axes(found), shapes)
    return {leaf_path(keys): leaf for keys, leaf in jax.tree.leaves_with_path(shardings)}.__getitem__


def _with_new_heads(params: dict[str, Any], parts: Parts) -> dict[str, Any]:
    """Parameters below the heads, with random heads such as the task now has."""
    shapes = jax.eval_shape(lambda: init_params(parts.model, jax.random.key(0)))
    shardings = parts.rules.shardings(logical_axes(parts.config.model), shapes)
    new = [name for name in shapes if name not in params or not _alike(params[name], shapes[name])]

    def create(key: jax.Array) -> Any:
        made = init_params(parts.model, key)
        return {name: made[name] for name in new}

    heads = jax.jit(create, out_shardings={name: shardings[name] for name in new})(jax.random.key(parts.config.seed))
    return {name: heads[name] if name in new else params[name] for name in shapes}


def _alike(left: Any, right: Any) -> bool:
    one, other = (jax.tree.map(lambda x: tuple(x.shape), tree) for tree in (left, right))
    return one == other
