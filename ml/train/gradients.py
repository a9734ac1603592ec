"""How the gradient of a whole batch comes to be: microbatch by microbatch, each layout in its way."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ml.models import Transformer, logical_axes
from ml.parallel import LAYOUTS, Rules
from ml.train.config import TrainConfig
from ml.train.objective import Batch, Metrics, make_loss
from ml.weights import Gathered


def make_gradients(
    model: Transformer, config: TrainConfig, rules: Rules | None
) -> Callable[[PyTree, Batch], tuple[PyTree, Metrics]]:
    """Returns ``(params, batch [microbatches, rows, length]) -> (gradients, metrics)``, summed over counted tokens.

    Gradients are float32 and leave cut as the parameters are kept, however they were accumulated.

    Args:
      model: the model.
      config: of training.
      rules: the layout; ``None``: off any mesh.
    """
    loss = make_loss(model, config)

    def gradients(params, batch):
        variables, weights_of = _differentiated(params, model, rules)
        grad_of = jax.value_and_grad(lambda v, microbatch: loss(weights_of(v), microbatch), has_aux=True)

        def accumulate(total, microbatch):
            (objective, metrics), grads = grad_of(variables, microbatch)
            return jax.tree.map(jnp.add, total, (grads, metrics | {"objective": objective})), None

        scalars = dict.fromkeys(("loss", "balance", "objective"), jnp.zeros((), jnp.float32))
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), variables)
        (grads, metrics), _ = jax.lax.scan(accumulate, (zeros, scalars), batch)
        return jax.tree.map(_as_kept, grads, params), metrics

    return gradients


def _differentiated(
    params: PyTree, model: Transformer, rules: Rules | None
) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """What the loss is differentiated by, and how the model's weights come from it.

    Where the layers read what the state keeps, that is the parameters themselves. Otherwise one copy in the type of
    activations is gathered, once for all microbatches: the copy is differentiated itself where gradients are whole
    (ZeRO-1), and stands beside the shards that receive its gradient where they are cut (ZeRO-2).
    """
    layout = LAYOUTS[rules.layout] if rules else None
    if rules is None or layout is None or layout.compute == layout.state:
        return params, lambda variables: variables

    def gathered(names, x):
        spec = rules.spec(*names, kind="compute")
        return x if spec == rules.spec(*names) else jax.reshard(x.astype(model.dtype), spec)

    axes = logical_axes(model.config)
    full = jax.tree.map(gathered, axes, params, is_leaf=lambda node: isinstance(node, tuple))
    if layout.gradients == layout.compute:
        return full, lambda variables: variables
    return params, lambda shards: jax.tree.map(
        lambda shard, copy: shard if jax.typeof(copy) == jax.typeof(shard) else Gathered(shard, copy), shards, full
    )


def _as_kept(gradient: jax.Array, param: jax.Array) -> jax.Array:
    kept = jax.typeof(param).sharding
    return gradient if jax.typeof(gradient).sharding == kept else jax.reshard(gradient, kept.spec)
