"""Everything a run needs before its first step: mesh, model, optimizer, data, state."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ml.checkpoint import Checkpointer
from ml.data import HeldoutBatches, Loader, Lookahead, Prepared, heldout_batches, make_loader, prepare
from ml.errors import UserError
from ml.models import Model, init_params, logical_axes, module_of
from ml.optim import eval_params, make_optimizer
from ml.parallel import Rules, loader_share
from ml.train.batch_shapes import abstract_batch
from ml.train.config import ExperimentConfig
from ml.train.evaluation import HeldoutLoss, make_evaluate
from ml.train.kinds import kind_of
from ml.train.noise_scale import check_noise_scale
from ml.train.objective import make_objective
from ml.train.objective_class import Objective
from ml.train.state import TrainState, init_state
from ml.train.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run that stay as they are from step to step."""

    config: ExperimentConfig
    rules: Rules
    model: Model
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    prepared: Prepared
    loader: Loader | Lookahead
    heldout: HeldoutBatches
    evaluate: Callable[..., Any]

    def params_to_evaluate(self, state: TrainState) -> Any:
        """The moving average, schedule-free's average, or the parameters themselves."""
        if state.ema is not None:
            return state.ema
        return eval_params(self.config.optimizer, state.opt_state, state.params)

    def heldout_loss(self, state: TrainState, batches: Iterable[Any], limit: int | None = None) -> HeldoutLoss:
        """The loss of the state over the first ``limit`` held-out batches (``None``: all)."""
        return self.evaluate(self.params_to_evaluate(state), batches, limit, state.model_state)


def make_parts(config: ExperimentConfig, workdir: Workdir) -> Parts:
    """Builds mesh, model, optimizer and data.

    Raises:
      UserError: something in ``config`` does not fit the devices, the data or something else in it.
    """
    train = config.train
    rules = Rules.make(config.mesh)
    check_fit(config, rules)
    prepared = prepare(config.data, workdir.path, where="config.data")
    kind_of(config.model).check_data(config, prepared)
    if jax.process_index() == 0:
        prepared.save(workdir.path)
    model = make_model(config, rules)
    tx, schedule = optimizer_of(config)
    parts, count = loader_share(rules)
    loader = make_loader(
        prepared,
        global_batch_size=train.batch_size,
        seed=config.seed,
        shard_index=parts,
        shard_count=count,
        microbatches=train.microbatches,
    )
    ahead = kind_of(config.model).lookahead(config)
    rows = config.eval.batch_size or train.batch_size // train.microbatches
    if rows % rules.batch_shards:
        raise UserError(f"config.eval.batch_size={rows} is not a multiple of {rules.batch_shards} batch shards")
    return Parts(
        config=config,
        rules=rules,
        model=model,
        tx=tx,
        schedule=schedule,
        prepared=prepared,
        loader=Lookahead(loader, ahead) if ahead else loader,
        heldout=heldout_batches(prepared, global_batch_size=rows, shard_index=parts, shard_count=count),
        evaluate=make_evaluate(model, train, rules),
    )


def check_fit(config: ExperimentConfig, rules: Rules) -> None:
    """Refuses what the mesh cannot cut evenly: a batch, its rows, experts, layers and weights.

    Raises:
      UserError: names the numbers and a valid choice.
    """
    train = config.train
    parts = train.microbatches * rules.batch_shards
    if train.batch_size % parts:
        raise UserError(
            f"config.train.batch_size={train.batch_size} is not a multiple of microbatches={train.microbatches} x "
            f"{rules.batch_shards} batch shards of the mesh; use a multiple of {parts}"
        )
    check_noise_scale(train, rules)
    kind_of(config.model).check_mesh(config, rules)
    shapes = jax.eval_shape(lambda: init_params(module_of(config.model), jax.random.key(0)))
    rules.shardings(logical_axes(config.model), shapes)


def optimizer_of(config: ExperimentConfig) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The experiment's optimizer and its learning rate."""
    return make_optimizer(
        config.optimizer,
        config.schedule,
        total_steps=config.train.steps,
        batch_size=config.train.batch_size,
        axes=logical_axes(config.model),
    )


def make_model(config: ExperimentConfig, rules: Rules) -> Model:
    """The model on the mesh, in the dtype that suits its devices."""
    dtype = config.train.dtype
    if dtype == "auto":
        dtype = "float32" if rules.mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    fields = kind_of(config.model).fields(config)
    return module_of(config.model, dtype=jnp.dtype(dtype), remat=config.train.remat, place=rules.spec, **fields)


def make_state(parts: Parts, checkpointer: Checkpointer) -> tuple[TrainState, dict[str, Any]]:
    """A fresh state, or the newest checkpoint's; also sets the loader to where it stood.

    Returns:
      The state, and what the recorder had put beside it (`ml.train.recorder.Recorder.state`).
    """
    train = parts.config.train
    objective = make_objective(parts.model, train, parts.rules)
    params, statistics = None, None
    if train.init_from and checkpointer.latest_step() is None:
        params, statistics = kind_of(parts.config.model).initial(parts)
    state = init_state(
        parts.model,
        parts.tx,
        parts.rules,
        seed=parts.config.seed,
        ema=train.ema > 0,
        offload=train.offload_optimizer,
        params=params,
        model_state=lambda: objective.model_state() if statistics is None else _each(objective, statistics),
        carried=lambda: objective.carried(abstract_batch(parts.config, parts.rules)),
    )
    if checkpointer.latest_step() is None:
        return state, {}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    jax.tree.map(lambda x: x.delete(), state)  # or both would be on the device at once
    restored = checkpointer.restore(abstract)
    if restored.data_state is None:
        raise UserError(f"{checkpointer.directory} holds a model, not a run; name its folder in config.train.init_from")
    parts.loader.set_state(restored.data_state["loader"])
    return restored.state, restored.data_state


def _each(objective: Objective, statistics: dict[str, Any]) -> dict[str, Any]:
    """All collections of a model's running statistics, as they are in another model."""
    return {name: jax.tree.map(jnp.array, statistics) for name in objective.model_state()}
