"""What training carries from step to step, and how it comes to be on the mesh."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from ml.models import Model, init_params, logical_axes
from ml.parallel import Rules
from ml.train.offload import HOST, moved_to_host, on_host

# Collections of `TrainState.model_state`: running statistics of batch norm, and their moving average.
RUNNING, AVERAGED = "batch_stats", "average_batch_stats"


@flax.struct.dataclass
class TrainState:
    """The state of a run, all of it in the checkpoint.

    Attributes:
      step: optimizer steps done, skipped ones included.
      params: float32.
      opt_state: of the optax transform.
      ema: moving average of ``params``, or ``None``.
      skipped: steps dropped for a NaN or infinity.
      model_state: what a model carries besides parameters (running statistics of batch norm), by collection; empty for
        most (`ml.train.objective_class.Objective.model_state`).
      carried: arrays that belong to the next batch (`ml.train.objective_class.Objective.carried`); empty for most.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    ema: PyTree | None
    skipped: Int[Array, ""]
    model_state: dict[str, PyTree] = flax.struct.field(default_factory=dict)
    carried: dict[str, jax.Array] = flax.struct.field(default_factory=dict)


def init_state(
    model: Model,
    tx: optax.GradientTransformation,
    rules: Rules,
    *,
    seed: int,
    ema: bool,
    offload: bool = False,
    params: Any = None,
    model_state: Callable[[], dict[str, PyTree]] = dict,
    carried: Callable[[], dict[str, jax.Array]] = dict,
) -> TrainState:
    """Creates the state on the mesh, each device only its shards.

    Args:
      model: the model.
      tx: the optimizer.
      rules: where parameters go; optimizer state follows them.
      seed: of the random parameters.
      ema: whether to keep a moving average.
      offload: whether the optimizer state lives in the hosts' memory.
      params: parameters to start from instead of random ones, already placed.
      model_state, carried: of the objective.
    """
    if params is None:
        create = jax.jit(lambda key: init_params(model, key), out_shardings=_shardings(model, rules))
        params = create(jax.random.key(seed))
    return jax.jit(lambda params: _around(params, tx, ema, offload, model_state, carried))(params).replace(
        params=params
    )


def abstract_state(
    model: Model,
    tx: optax.GradientTransformation,
    rules: Rules,
    *,
    ema: bool,
    offload: bool = False,
    model_state: Callable[[], dict[str, PyTree]] = dict,
    carried: Callable[[], dict[str, jax.Array]] = dict,
) -> TrainState:
    """The state as shapes and placements: what `init_state` would make, on devices that need not exist."""
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, _shardings(model, rules)
    )
    with jax.sharding.use_abstract_mesh(rules.mesh.abstract_mesh):
        rest = jax.eval_shape(lambda params: _around(params, tx, ema, False, model_state, carried), params)

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if leaf.sharding else PartitionSpec()  # counters made from no array have none
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(rules.mesh, spec))

    def hosted(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not on_host(leaf):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind(HOST))

    state = jax.tree.map(placed, rest).replace(params=params)
    return state.replace(opt_state=jax.tree.map(hosted, state.opt_state)) if offload else state


def _shardings(model: Model, rules: Rules) -> PyTree[NamedSharding]:
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return rules.shardings(logical_axes(model.config), shapes)


def _around(
    params: PyTree,
    tx: optax.GradientTransformation,
    ema: bool,
    offload: bool,
    model_state: Callable[[], dict[str, PyTree]],
    carried: Callable[[], dict[str, jax.Array]],
) -> TrainState:
    """All of a state but the parameters themselves, which are not copied."""
    opt_state, zeros = tx.init(params), jnp.zeros((2,), jnp.int32)
    return TrainState(
        step=zeros[0],
        params=None,
        opt_state=moved_to_host(opt_state) if offload else opt_state,
        # `copy` gives the average buffers of its own: both are donated to the step.
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        skipped=zeros[1],
        model_state=model_state(),
        carried=carried(),
    )
