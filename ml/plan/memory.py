"""Bytes of a train step on one device by formula, before anything is compiled: what the planner and the mends go by."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from ml.models import init_params, logical_axes, module_of
from ml.parallel import AXES, LAYOUTS, Rules
from ml.parallel.rules import Kind
from ml.train.config import ExperimentConfig
from ml.train.memory import predicted_activations
from ml.train.setup import optimizer_of
from ml.weights.shards import mesh_axes


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      params: float32, as kept from step to step.
      opt_state: of the optimizer, on the device.
      ema: the moving average.
      compute_copies: weights gathered once a step, in the type of activations (ZeRO-1 and ZeRO-2).
      gradients: as they are accumulated, and those of the microbatch in hand if there are several.
      gathered: whole weights of the layer in hand and of the next, and their gradients (ZeRO-3, hybrid).
      activations: kept for the backward pass, with a layer's working set or the logits.
      host: optimizer state in the host's memory.
    """

    params: int
    opt_state: int
    ema: int
    compute_copies: int
    gradients: int
    gathered: int
    activations: int
    host: int

    @property
    def total(self) -> int:
        """On the device."""
        return sum(dataclasses.asdict(self).values()) - self.host


@dataclasses.dataclass(frozen=True)
class _Leaf:
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    itemsize: int

    def bytes(self, rules: Rules, kind: Kind, itemsize: int = 0) -> int:
        """On one device."""
        shards = 1
        for entry in rules.spec(*self.axes, kind=kind):
            shards *= math.prod(rules.mesh.shape[name] for name in mesh_axes(entry))
        return math.prod(self.shape) * (itemsize or self.itemsize) // shards


class MemoryModel:
    """Predicts memory for one architecture and optimizer under many meshes and settings."""

    def __init__(self, config: ExperimentConfig):
        self._model = config.model
        model = module_of(config.model)
        shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        axes = logical_axes(config.model)
        named = jax.tree.leaves_with_path(axes, is_leaf=lambda node: isinstance(node, tuple))
        self.params = {
            _keys(path): _Leaf(names, leaf.shape, 4)
            for (path, names), leaf in zip(named, jax.tree.leaves(shapes), strict=True)
        }
        state = jax.eval_shape(optimizer_of(config)[0].init, shapes)
        self._state = [self._state_leaf(_keys(path), leaf) for path, leaf in jax.tree.leaves_with_path(state)]

    def _state_leaf(self, keys: tuple[str, ...], leaf: Any) -> _Leaf:
        """Optimizer state that has a parameter's shape is cut like it, by the path that it ends with."""
        for start in range(len(keys)):
            param = self.params.get(keys[start:])
            if param is not None and param.shape == leaf.shape:
                return dataclasses.replace(param, itemsize=leaf.dtype.itemsize)
        return _Leaf((None,) * leaf.ndim, leaf.shape, leaf.dtype.itemsize)  # type: ignore[arg-type]

    def state_bytes(self, rules: Rules) -> tuple[int, int]:
        """Of parameters and of optimizer state on one device."""
        params = self.weight_bytes(rules, "state", 4)
        return params, sum(leaf.bytes(rules, "state") for leaf in self._state)

    def weight_bytes(self, rules: Rules, kind: Kind, itemsize: int) -> int:
        """Of all weights, or of as many gradients, on one device."""
        return sum(leaf.bytes(rules, kind, itemsize) for leaf in self.params.values())

    def predict(self, config: ExperimentConfig, rules: Rules, itemsize: int = 2) -> Memory:
        """The memory of ``config``, whose model and optimizer are those that this was made for.

        Args:
          config: the experiment.
          rules: its layout; see `abstract_rules`.
          itemsize: bytes of an activation.
        """
        train, layout, degrees = config.train, LAYOUTS[rules.layout], dict(rules.mesh.shape)
        params, opt_state = self.state_bytes(rules)
        copies = self.weight_bytes(rules, "compute", itemsize) if layout.compute != layout.state else 0
        gradients = self.weight_bytes(rules, "gradients", 4)
        return Memory(
            params=params,
            opt_state=0 if train.offload_optimizer else opt_state,
            ema=params if train.ema > 0 else 0,
            compute_copies=copies,
            gradients=gradients * (2 if train.microbatches > 1 else 1),
            gathered=self.gathered_bytes(rules, itemsize) if any(degrees[a] > 1 for a in layout.compute) else 0,
            activations=predicted_activations(config, degrees, jnp.bfloat16 if itemsize == 2 else jnp.float32),
            host=opt_state if train.offload_optimizer else 0,
        )

    def gathered_bytes(self, rules: Rules, itemsize: int) -> int:
        """Whole weights in flight: two layers' with one's gradient, or the unembedding with its own if that is more."""
        whole = dataclasses.replace(rules, layout="ddp")
        layer = head = 0
        for keys, leaf in self.params.items():
            size = leaf.bytes(whole, "compute", itemsize)
            if leaf.axes[:1] == ("layers",):
                layer += size * rules.mesh.shape["stage"] // leaf.shape[0]
            elif "vocab" in leaf.axes and (keys[0] == "unembed" or getattr(self._model, "tie_embeddings", False)):
                head = size
        return max(3 * layer, 2 * head)


@functools.lru_cache(maxsize=4096)
def abstract_rules(degrees: tuple[int, ...], layout: str, sequence_residual: bool = False) -> Rules:
    """Rules on a mesh of these degrees, in the order of `ml.parallel.AXES`, that has no devices."""
    mesh = AbstractMesh(degrees, AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    return Rules(mesh, layout, sequence_residual)  # type: ignore[arg-type]


def _keys(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
