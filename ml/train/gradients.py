"""How the gradient of a whole batch comes to be: microbatch by microbatch, each layout in its way."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, PyTree

from ml.models import Transformer, logical_axes
from ml.parallel import LAYOUTS, Rules
from ml.train.config import TrainConfig
from ml.train.objective import Batch, Metrics, make_loss
from ml.weights import Gathered


def make_gradients(
    model: Transformer, config: TrainConfig, rules: Rules | None
) -> Callable[[PyTree, Batch], tuple[PyTree, Metrics, Int[Array, "layers experts"]]]:
    """Returns ``(params, batch [microbatches, rows, length]) -> (gradients, metrics, expert counts)``, all sums.

    Gradients and metrics are summed over counted tokens; the last says how often each expert was chosen.

    Gradients are float32 and leave cut as the parameters are kept, however they were accumulated.

    Args:
      model: the model.
      config: of training.
      rules: the layout; ``None``: off any mesh.
    """
    loss, moe = make_loss(model, config, rules), model.config.moe

    def gradients(params, batch):
        variables, weights_of = _differentiated(params, model, rules)
        grad_of = jax.value_and_grad(lambda v, *rest: loss(weights_of(v), *rest), has_aux=True)

        def accumulate(total, microbatch):
            (objective, metrics), grads = grad_of(variables, microbatch, total[1]["expert_counts"])
            return jax.tree.map(jnp.add, total, (grads, metrics | {"objective": objective})), None

        scalars = dict.fromkeys(("loss", "balance", "objective"), jnp.zeros((), jnp.float32))
        scalars["expert_counts"] = jnp.zeros((model.config.num_layers, moe.num_experts if moe else 0), jnp.int32)
        zeros = jax.tree.map(_zero_gradient, variables)
        (grads, metrics), _ = jax.lax.scan(accumulate, (zeros, scalars), batch)
        expert_counts = metrics.pop("expert_counts")
        return jax.tree.map(_as_kept, grads, params), metrics, expert_counts

    return gradients


def _differentiated(
    params: PyTree, model: Transformer, rules: Rules | None
) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """What the loss is differentiated by, and how the model's weights come from it.

    Where the layers read what the state keeps, that is the parameters themselves. Otherwise one copy in the type of
    activations is gathered, once for all microbatches: the copy is differentiated itself where gradients are whole
    (ZeRO-1), and stands beside the shards that receive its gradient where they are cut (ZeRO-2).

    Copies of kernels and tables are typed so that their gradient is not summed over the devices at once
    (`PartitionSpec.reduced`). Whole gradients stay partial sums until all microbatches are done and cross the network
    once a step; those that are cut are reduced and cut in one collective.
    """
    if rules is None:
        return params, lambda variables: variables
    layout, apart = LAYOUTS[rules.layout], rules.partial_gradient_axes

    def read(path, names, x):
        spec = rules.spec(*names, kind="compute")
        if apart and path[-1].key in ("kernel", "embedding") and "expert" not in names:
            spec = PartitionSpec(*spec, reduced=apart)
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
