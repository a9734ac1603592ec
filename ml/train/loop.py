"""The training loop."""

import dataclasses
import os
import signal
import time

import jax

from ml.checkpoint import Checkpointer
from ml.data import Prepared
from ml.models import num_parameters
from ml.parallel import place_batch
from ml.parallel.processes import Agreement, Watch
from ml.train.closing import Closing
from ml.train.config import ExperimentConfig
from ml.train.evaluation import HeldoutLoss
from ml.train.interrupt import Interrupt
from ml.train.kinds import kind_of
from ml.train.memory import MemoryUse, memory_use, predicted_activations
from ml.train.recorder import Pending, Recorder
from ml.train.setup import make_parts, make_state
from ml.train.step import make_train_step
from ml.train.workdir import Workdir
from pallas_kernels.chips import peak_flops


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      step: steps done.
      tokens: counted tokens trained on, in all.
      seconds: wall time of this start's steps, compilation and evaluation left out.
      session_tokens: tokens trained on in those seconds.
      heldout: loss on the whole held-out text; ``None``: there is none, or the run was interrupted.
      interrupted: the signal that ended it early.
      parameters: number of parameters.
      flops_per_token: of the model, forward and backward.
      peak_flops: FLOP/s of all devices together, if known.
      memory: on a device; ``None`` if no step was run.
      prepared: the data.
      workdir: where everything lies.
      unit: what ``tokens`` counts: tokens or images.
      broken: images that could not be read in training.
    """

    step: int
    tokens: int
    seconds: float
    session_tokens: int
    heldout: HeldoutLoss | None
    interrupted: signal.Signals | None
    parameters: int
    flops_per_token: float
    peak_flops: float | None
    memory: MemoryUse | None
    prepared: Prepared
    workdir: Workdir
    unit: str = "tokens"
    broken: int = 0


def train(config: ExperimentConfig, path: str | os.PathLike[str], watch: Watch | None = None) -> Result:
    """Trains in the work directory ``path``, going on from its newest whole checkpoint if there is one.

    The host runs one step ahead of the device: while a step computes, the next batch is placed, and the scalars that
    are read are those of the step before. All processes of a run call this; a signal to any of them ends all after the
    same step.

    Args:
      config: the experiment.
      path: the work directory, in a file system that all processes share.
      watch: of `ml.parallel.processes.join`, where there are several processes.

    Raises:
      UserError: bad configuration or data, a work directory of another run, a full disk, a loss that is not finite.
    """
    watch = watch or Watch()
    workdir = Workdir(path)
    changes = workdir.check(config)
    workdir.check_shared()
    watch.at("preparing data")
    parts = make_parts(config, workdir)
    mesh, steps = parts.rules.mesh, config.train.steps
    peak = peak_flops(mesh.devices.flat[0].device_kind, parts.model.dtype)
    peak = peak and peak * mesh.size
    flops, parameters = config.flops_per_token, num_parameters(config.model)
    memory, seconds, evaluating, stop = None, 0.0, 0.0, 0

    with (
        jax.set_mesh(mesh),
        Closing(workdir) as closing,
        Checkpointer(workdir.path, config.checkpoint) as checkpointer,
        Interrupt() as interrupt,
        watch.failures(),
    ):
        watch.at("restoring")
        state, recorded = make_state(parts, checkpointer)
        if jax.process_index() == 0:
            workdir.claim(config)
        closing.begin(parts, parameters)
        first = int(jax.device_get(state.step))
        recorder = Recorder(
            config,
            workdir,
            first_step=first,
            state=recorded,
            skipped=int(jax.device_get(state.skipped)),
            flops_per_token=flops,
            peak_flops=peak,
        )
        with recorder:
            for change in changes:
                recorder.display.log(f"changed since the last start: {change}")
            if first:
                recorder.display.log(f"going on from the checkpoint of step {first}")
            pending, started = None, None
            step_fn = make_train_step(parts.model, parts.tx, parts.schedule, config.train, parts.rules)
            agreement = Agreement(mesh)
            for step in range(first + 1, steps + 1):
                watch.at("data", step)
                host_batch = next(parts.loader)
                batch = place_batch(host_batch, parts.rules, config.train.microbatches)
                if memory is None:
                    watch.at("compiling")
                    compiled = jax.jit(step_fn, donate_argnums=0).lower(state, batch).compile()
                    memory = closing.memory = memory_use(state, compiled)
                    formula = predicted_activations(config, mesh.shape, parts.model.dtype) / 2**20
                    recorder.display.log(f"memory: {memory} (activations by formula: {formula:,.0f})")
                watch.at("step")
                with jax.transfer_guard("disallow"):
                    state, metrics = compiled(state, batch)
                recorder.finish(pending)
                if pending and started is None:  # the first step is warm-up
                    started, session_start = time.monotonic(), recorder.tokens
                pending = Pending(step, metrics, host_batch)

                stop, counter = agreement.exchange(interrupt.received or 0, state.step)
                state = state.replace(step=counter)
                last = step == steps or stop != 0
                if last or step % config.checkpoint.every == 0 or (config.eval.every and step % config.eval.every == 0):
                    more = {}
                    jax.block_until_ready(state)
                    pause = time.monotonic()
                    if config.eval.every and step % config.eval.every == 0 and parts.prepared.heldout_rows:
                        batches = watch.over(parts.heldout, "evaluating")
                        loss = parts.heldout_loss(state, batches, config.eval.batches)
                        more = {f"eval_{name}": value for name, value in loss.scalars.items()}
                    recorder.finish(pending, more)
                    pending = None
                    watch.at("saving")
                    data_state = {"loader": parts.loader.get_state(), **recorder.state}
                    checkpointer.save(step, state, data_state, force=last)
                    recorder.plot()
                    recorder.display.pause()
                    if started is not None:
                        evaluating += time.monotonic() - pause
                if last:
                    break
            if started is not None:
                seconds = time.monotonic() - started - evaluating
        if memory is not None:
            memory = closing.memory = memory_use(state, compiled)  # now with the peak that the device measured
        heldout = None
        if not stop and parts.prepared.heldout_rows:
            recorder.display.log("evaluating on all held-out data")
            heldout = closing.heldout = parts.heldout_loss(state, watch.over(parts.heldout, "evaluating"))
        watch.at("saving")
        checkpointer.wait()
        parts.loader.close()
        done = int(jax.device_get(state.step))
        interrupted = closing.interrupted = signal.Signals(stop) if stop else None

    return Result(
        step=done,
        tokens=recorder.tokens,
        seconds=seconds,
        session_tokens=recorder.tokens - session_start if started is not None else 0,
        heldout=heldout,
        interrupted=interrupted,
        parameters=parameters,
        flops_per_token=flops,
        peak_flops=peak,
        memory=memory,
        prepared=parts.prepared,
        workdir=workdir,
        unit=kind_of(config.model).unit,
        broken=recorder.broken,
    )
