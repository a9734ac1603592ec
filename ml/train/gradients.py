"""How the gradient of a whole batch comes to be: microbatch by microbatch, each layout in its way."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from ml.models import Model, Transformer, logical_axes
from ml.parallel import LAYOUTS, Rules
from ml.train import noise_scale
from ml.train.config import TrainConfig
from ml.train.contrastive import Embedded, two_pass_value_and_grad
from ml.train.objective import make_objective
from ml.train.objective_class import Batch, Metrics
from ml.train.pipeline import pipelined_value_and_grad
from ml.weights import Gathered

# Kernels with such an axis are multiplied where JAX keeps no partial sums apart: in a `shard_map` (experts), or where
# placement is left to the compiler (convolutions).
_SUMMED_AT_ONCE = {"expert", "channels"}


def make_gradients(
    model: Model, config: TrainConfig, rules: Rules | None
) -> Callable[[PyTree, Batch], tuple[PyTree, Metrics, Metrics, Metrics]]:
    """Returns ``(params, batch [microbatches, rows, ...]) -> (gradients, metrics, extras, noise)``.

    Gradients and metrics are summed over counted tokens, extras are what the objective adds up besides (how often each
    expert was chosen), the last says how much the parts of the batch disagree (`noise_scale.estimate`), if
    ``config.noise_scale`` asks for it.

    Gradients are float32 and leave cut as the parameters are kept, however they were accumulated.

    Args:
      model: the model.
      config: of training.
      rules: the layout; ``None``: off any mesh.
    """
    if rules is not None and rules.mesh.shape["stage"] > 1:
        assert isinstance(model, Transformer)  # `check_fit` refuses encoders
        return _through_stages(model, config, rules)
    objective_of = make_objective(model, config, rules)
    if objective_of.embedded is not None:
        return _in_two_passes(objective_of.embedded, model, rules)

    def gradients(params, batch):
        variables, constants = _differentiated(params, model, rules)
        grad_of = jax.value_and_grad(lambda v, *rest: objective_of.loss(_weights(v, constants), *rest), has_aux=True)

        def of_microbatch(microbatch, extras):
            (objective, metrics), grads = grad_of(variables, microbatch, extras)
            if config.noise_scale:
                metrics |= {"squares": noise_scale.part_squares(variables, grads, microbatch["loss_mask"])}
            return grads, metrics | {"objective": objective}

        def accumulate(total, microbatch):
            earlier = {name: total[1][name] for name in nothing}
            return jax.tree.map(jnp.add, total, of_microbatch(microbatch, earlier)), None

        nothing = objective_of.extras()
        if batch["loss_mask"].shape[0] == 1:  # there is nothing to add up, and no second copy of the gradient
            grads, metrics = of_microbatch(jax.tree.map(lambda x: x[0], batch), nothing)
        else:
            scalars: dict[str, Any] = dict.fromkeys((*objective_of.masks, "objective"), jnp.zeros((), jnp.float32))
            if config.noise_scale:
                scalars["squares"] = noise_scale.no_squares(variables)
            start = jax.tree.map(_zero_gradient, variables), scalars | nothing
            (grads, metrics), _ = jax.lax.scan(accumulate, start, batch)
        extras, squares = {name: metrics.pop(name) for name in nothing}, metrics.pop("squares", None)
        grads = jax.tree.map(_as_kept, grads, params)
        noise = noise_scale.estimate(squares, variables, grads, batch["loss_mask"]) if squares is not None else {}
        return grads, metrics, extras, noise

    return gradients


def _through_stages(model: Transformer, config: TrainConfig, rules: Rules):
    """`make_gradients` where the layers are cut over the stages of a pipeline, through which microbatches flow."""
    step = pipelined_value_and_grad(model, config, rules, wrap=_weights)

    def gradients(params, batch):
        variables, constants = _differentiated(params, model, rules)
        grads, metrics = step(variables, batch, constants)
        extras = {"expert_counts": metrics.pop("expert_counts")}
        return jax.tree.map(_as_kept, grads, params), metrics, extras, {}

    return gradients


def _in_two_passes(embedded: Embedded, model: Model, rules: Rules | None):
    """`make_gradients` of a loss that is no sum over microbatches."""

    def gradients(params, batch):
        variables, constants = _differentiated(params, model, rules)

        def embed(variables, microbatch):
            return embedded.embed(_weights(variables, constants), microbatch)

        def loss(head, embeddings, batch):
            return embedded.loss(
                _weights(head, constants and {name: constants[name] for name in head}), embeddings, batch
            )

        step = two_pass_value_and_grad(
            Embedded(embed, loss, embedded.head), lambda params: jax.tree.map(_zero_gradient, params)
        )
        (objective, metrics), grads = step(variables, batch)
        return jax.tree.map(_as_kept, grads, params), metrics | {"objective": objective}, {}, {}

    return gradients


def _differentiated(params: PyTree, model: Model, rules: Rules | None) -> tuple[PyTree, PyTree]:
    """What the loss is differentiated by, and constants, from which `_weights` makes what the layers read.

    Where the layers read what the state keeps, that is the parameters themselves. Otherwise one copy in the type of
    activations is gathered, once for all microbatches: the copy is differentiated itself where gradients are whole
    (ZeRO-1), and stands beside the shards that receive its gradient where they are cut (ZeRO-2).

    Copies of kernels and tables are typed so that their gradient is not summed over the devices at once
    (`PartitionSpec.reduced`). Whole gradients stay partial sums until all microbatches are done and cross the network
    once a step; those that are cut are reduced and cut in one collective.
    """
    if rules is None:
        return params, None
    layout, apart = LAYOUTS[rules.layout], rules.partial_gradient_axes

    def read(path, names, x):
        spec = rules.spec(*names, kind="compute")
        if apart and path[-1].key in ("kernel", "embedding") and not _SUMMED_AT_ONCE & set(names):
            spec = PartitionSpec(*spec, reduced=apart)
        if jax.typeof(x).sharding.spec == spec:
            return x
        return jax.reshard(x if layout.compute == layout.state else x.astype(model.dtype), spec)

    axes = logical_axes(model.config)
    copies = jax.tree.map_with_path(read, axes, params, is_leaf=lambda node: isinstance(node, tuple))
    return (copies, None) if layout.gradients == layout.compute else (params, copies)


def _weights(variables: PyTree, constants: PyTree) -> PyTree:
    """The leaves that the layers multiply by; see `_differentiated`."""
    if constants is None:
        return variables
    return jax.tree.map(
        lambda shard, copy: shard if jax.typeof(copy) == jax.typeof(shard) else Gathered(shard, copy),
        variables,
        constants,
    )


def _zero_gradient(x: jax.Array) -> jax.Array:
    spec = jax.typeof(x).sharding.spec
    if spec.reduced:
        return jnp.zeros(x.shape, jnp.float32, out_sharding=PartitionSpec(*spec.partitions, unreduced=spec.reduced))
    return jnp.zeros_like(x, jnp.float32)


def _as_kept(gradient: jax.Array, param: jax.Array) -> jax.Array:
    kept = jax.typeof(param).sharding
    gradient = gradient.astype(jnp.float32)  # before devices are summed
    return gradient if jax.typeof(gradient).sharding == kept else jax.reshard(gradient, kept.spec)
