"""What a run has learned: one of its checkpoints, measured on what it holds out."""

import dataclasses
import os

import jax

from ml.checkpoint import restore_params
from ml.checkpoint.pretrained import params_to_evaluate
from ml.data import heldout_batches, prepare
from ml.errors import UserError
from ml.models import init_model_state
from ml.parallel import MeshConfig, Rules
from ml.train.evaluation import HeldoutLoss, make_evaluate
from ml.train.setup import make_model
from ml.train.workdir import Workdir


def heldout_of_run(folder: str | os.PathLike[str], step: int | None = None, batch_size: int = 8) -> HeldoutLoss:
    """Measures a checkpoint on this machine's devices, whatever the run's were.

    Args:
      folder: the run's work directory.
      step: of the checkpoint; ``None``: the newest whole one.
      batch_size: rows at a time, at least; more where the devices want equal shares.

    Raises:
      UserError: no such run or checkpoint, nothing is held out, or its data are no longer there.
    """
    workdir = Workdir(folder)
    config = dataclasses.replace(workdir.read_config(), mesh=MeshConfig())
    prepared = prepare(config.data, workdir.path, where="config.data")
    if not prepared.heldout_rows:
        raise UserError(f"--model={workdir.path} is of a run that held nothing out")
    rules = Rules.make(config.mesh)
    rows = -(-batch_size // rules.batch_shards) * rules.batch_shards
    model = make_model(config, rules)
    params = params_to_evaluate(workdir.path, step, None)
    carries = bool(jax.eval_shape(lambda: init_model_state(model)))
    model_state = restore_params(workdir.path, step, subtree="model_state")[1] if carries else {}
    with jax.set_mesh(rules.mesh):
        placed = jax.device_put((params, model_state), rules.sharding())
        evaluate = make_evaluate(model, config.train, rules)
        return evaluate(placed[0], heldout_batches(prepared, global_batch_size=rows), model_state=placed[1])
