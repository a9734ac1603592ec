"""The real train step of an experiment, put together for devices that need not exist."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from ml.models import Model
from ml.parallel import Rules
from ml.train.batch_shapes import abstract_batch
from ml.train.config import ExperimentConfig
from ml.train.objective import make_objective
from ml.train.setup import check_fit, make_model, optimizer_of
from ml.train.state import TrainState, abstract_state
from ml.train.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A train step and the shapes, with their placement, that it takes.

    Attributes:
      config: the experiment.
      rules: mesh and layout.
      model, tx: as in training.
      state, batch: of `jax.ShapeDtypeStruct`.
    """

    config: ExperimentConfig
    rules: Rules
    model: Model
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    state: TrainState
    batch: dict[str, Any]

    @functools.cached_property
    def step(self) -> Callable[..., Any]:
        """The train step, not compiled yet; it donates its state."""
        step = make_train_step(self.model, self.tx, self.schedule, self.config.train, self.rules)
        return jax.jit(step, donate_argnums=0)

    @functools.cached_property
    def traced(self) -> Any:
        """The step's `jax.stages.Traced`."""
        with jax.set_mesh(self.rules.mesh):
            return self.step.trace(self.state, self.batch)  # type: ignore[attr-defined]

    def compile(self) -> Any:
        """Compiles the step for the mesh's devices; raises whatever their compiler raises."""
        with jax.set_mesh(self.rules.mesh):
            return self.traced.lower().compile()


def assemble(config: ExperimentConfig, devices: Sequence[Any] | None = None) -> Program:
    """Builds the step that `ml.train.train` would run, without its data.

    Args:
      config: the experiment; its data is not read.
      devices: what the mesh is made of; default: this machine's.

    Raises:
      UserError: the mesh does not fit the devices, the model or the batch.
    """
    rules = Rules.make(config.mesh, devices)
    check_fit(config, rules)
    model = make_model(config, rules)
    tx, schedule = optimizer_of(config)
    objective, batch = make_objective(model, config.train, rules), abstract_batch(config, rules)
    state = abstract_state(
        model,
        tx,
        rules,
        ema=config.train.ema > 0,
        offload=config.train.offload_optimizer,
        model_state=objective.model_state,
        carried=lambda: objective.carried(batch),
    )
    return Program(config, rules, model, tx, schedule, state, batch)
