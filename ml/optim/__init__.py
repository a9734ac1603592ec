"""Optimizers and schedules: a configuration in, an optax transform and a learning-rate schedule out.

A new optimizer is a builder ``name(inputs, *, option=default, ...) -> optax.GradientTransformation`` in a file of its
own, and one line in `OPTIMIZERS`.
"""

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from ml import config as configuration
from ml.errors import UserError, nearest
from ml.optim.builder import Inputs
from ml.optim.elementwise import adamw, lion, nadamw, sgd
from ml.optim.lamb import lamb
from ml.optim.lars import lars, lars_2017
from ml.optim.learning_rate_free import cocob, dadapt_adamw, dog, dowg, mechanic_adamw, prodigy
from ml.optim.masks import EXCLUDED, excluding, path_names
from ml.optim.memory_saving import adafactor, adafactorw, sm3
from ml.optim.muon import muon
from ml.optim.schedule_free import averaged_params, schedule_free_adamw, schedule_free_sgd
from ml.optim.schedules import ScheduleConfig, StageConfig, make_schedule, scaled_learning_rate

__all__ = [
    "OPTIMIZERS",
    "OptimizerConfig",
    "ScheduleConfig",
    "StageConfig",
    "eval_params",
    "make_optimizer",
    "make_schedule",
    "scaled_learning_rate",
]

PyTree = Any

OPTIMIZERS: Mapping[str, Callable[..., optax.GradientTransformation]] = types.MappingProxyType(
    {
        "lamb": lamb,
        "lars": lars,
        "lars_2017": lars_2017,
        "adamw": adamw,
        "nadamw": nadamw,
        "sgd": sgd,
        "lion": lion,
        "adafactor": adafactor,
        "adafactorw": adafactorw,
        "sm3": sm3,
        "muon": muon,
        "schedule_free_adamw": schedule_free_adamw,
        "schedule_free_sgd": schedule_free_sgd,
        "dadapt_adamw": dadapt_adamw,
        "prodigy": prodigy,
        "dog": dog,
        "dowg": dowg,
        "mechanic_adamw": mechanic_adamw,
        "cocob": cocob,
    }
)


NO_OUTSIDE_MOVES = frozenset({"schedule_free_adamw", "schedule_free_sgd", "mechanic_adamw", "cocob", "dog", "dowg"})
"""Optimizers that work out a parameter from their own state, or a rate from how far all parameters have come: a
parameter that something else moves (the router's bias, `ml.models.moe.update_router_bias`) would be put back, or would
set the rate."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer by name, and its setting.

    Attributes:
      name: a key of `OPTIMIZERS`.
      learning_rate: peak of the schedule, before batch scaling; 1.0 is usual for the learning-rate-free optimizers.
      weight_decay: decoupled and multiplied by the learning rate, except where the optimizer's docstring says that it
        is part of the gradient.
      clip_norm: gradients are scaled down to this global L2 norm first; 0: never.
      no_decay: names of parameters (or of modules above them) that do not decay; LAMB and LARS do not rescale them
        either, unless told otherwise.
      options: what else the optimizer of this name takes: the keywords of its builder.
    """

    name: str
    learning_rate: float
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    no_decay: tuple[str, ...] = EXCLUDED
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise UserError(f"optimizer.name: no optimizer is called {self.name!r}; {nearest(self.name, OPTIMIZERS)}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
        if self.weight_decay < 0 or self.clip_norm < 0:
            raise ValueError("weight_decay and clip_norm must not be negative")
        _checked_options(self.name, self.options)


def make_optimizer(
    optimizer: OptimizerConfig, schedule: ScheduleConfig, *, total_steps: int, batch_size: int, axes: PyTree
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds the transform that turns gradients into parameter updates, and the learning rate it follows.

    ``update`` needs the parameters. Create the state with ``jax.jit(transform.init)(params)``: it then has buffers of
    its own, sharded as the parameters are. Every leaf of the state is an array.

    Args:
      optimizer: which one, and its setting.
      schedule: how the rate moves.
      total_steps: optimizer steps in the whole training.
      batch_size: global batch, in sequences.
      axes: pytree like params whose leaves are tuples of logical axis names; slices along ``layers`` and ``expert``
        are tensors of their own.

    Raises:
      UserError: a schedule that does not fit ``total_steps``; an optimizer that cannot leave the router's bias alone.
    """
    paths = [path_names(path) for path, _ in jax.tree.leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))]
    if optimizer.name in NO_OUTSIDE_MOVES and any(path[-2:] == ("router", "bias") for path in paths):
        raise UserError(
            f"optimizer.name={optimizer.name} cannot train beside a router bias that follows the load; set "
            "model.moe.bias_update_rate=0, or choose another optimizer, such as lamb or adamw"
        )
    rate = make_schedule(schedule, optimizer.learning_rate, total_steps=total_steps, batch_size=batch_size)
    inputs = Inputs(rate, optimizer.weight_decay, excluding(optimizer.no_decay), axes)
    transform = OPTIMIZERS[optimizer.name](inputs, **_checked_options(optimizer.name, optimizer.options))
    if optimizer.clip_norm:
        transform = optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), transform)
    return transform, rate


def eval_params(optimizer: OptimizerConfig, opt_state: PyTree, params: PyTree) -> PyTree:
    """The parameters to evaluate and to serve: schedule-free learning's average, or else ``params`` themselves."""
    return averaged_params(opt_state, params) if optimizer.name.startswith("schedule_free") else params


def _checked_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Checks ``options`` against the keywords of the builder, as `ml.config.build` checks a dataclass."""
    builder = OPTIMIZERS[name]
    hints = typing.get_type_hints(builder)
    keywords = [p for p in inspect.signature(builder).parameters.values() if p.kind is p.KEYWORD_ONLY]
    fields = [(p.name, hints[p.name], dataclasses.field(default=p.default)) for p in keywords]
    checked: Any = configuration.build(dataclasses.make_dataclass(name, fields), options, "optimizer.options")
    return {key: getattr(checked, key) for key in options}
