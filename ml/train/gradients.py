"""How the gradient of a whole batch comes to be: microbatch by microbatch, each layout in its way."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
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
        zeros = jax.tree.map(_zero_gradient, variables)
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

    Along axes where gradients are whole, those of kernels and tables stay partial sums until all microbatches are
    done, so that they cross the network once a step (`PartitionSpec.reduced`: a copy whose gradient is not summed).
    """
    if rules is None:
        return params, lambda variables: variables
    layout, late = LAYOUTS[rules.layout], rules.summed_late

    def read(path, names, x):
        spec = rules.spec(*names, kind="compute")
        if late and path[-1].key in ("kernel", "embedding") and "expert" not in names:
            spec = PartitionSpec(*spec, reduced=late)
        if jax.typeof(x).sharding.spec == spec:
            return x
        return jax.reshard(x if layout.compute == layout.state else x.astype(model.dtype), spec)

    axes = logical_axes(model.config)
    copies = jax.tree.map_with_path(read, axes, params, is_leaf=lambda node: isinstance(node, tuple))
    if layout.gradients == layout.compute:
        return copies, lambda variables: variables
    return params, lambda shards: jax.tree.map(
        lambda shard, copy: shard if jax.typeof(copy) == jax.typeof(shard) else Gathered(shard, copy), shards, copies
    )


def _zero_gradient(x: jax.Array) -> jax.Array:
    spec = jax.typeof(x).sharding.spec
    if spec.reduced:
        return jnp.zeros(x.shape, jnp.float32, out_sharding=PartitionSpec(*spec.partitions, unreduced=spec.reduced))
    return jnp.zeros_like(x, jnp.float32)


def _as_kept(gradient: jax.Array, param: jax.Array) -> jax.Array:
    kept = jax.typeof(param).sharding
    return gradient if jax.typeof(gradient).sharding == kept else jax.reshard(gradient, kept.spec)
