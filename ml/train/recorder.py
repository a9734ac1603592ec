"""Turns the scalars of a finished step into a row of metrics, events and the progress display."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ml.errors import UserError
from ml.train.config import ExperimentConfig
from ml.train.kinds import kind_of
from ml.train.noise_scale import SmoothedNoiseScale
from ml.train.reporting import MetricsFile, ProgressDisplay, TensorBoardWriter, plot_loss, read_metrics
from ml.train.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step that was dispatched, whose scalars may still be under way.

    Attributes:
      step: its number, counted from 1.
      metrics: on the device.
      batch: its data, kept in case the step turns out not to be finite.
    """

    step: int
    metrics: Mapping[str, jax.Array]
    batch: Mapping[str, np.ndarray]


class Recorder:
    """Writes and shows what a run did; only the first process does.

    Attributes:
      tokens: counted tokens (images) trained on so far.
      broken: broken images met in training so far, in whose place others stood.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        workdir: Workdir,
        *,
        first_step: int,
        state: Mapping[str, Any],
        skipped: int,
        flops_per_token: float,
        peak_flops: float | None,
    ):
        self.tokens: int = state.get("tokens", 0)
        self.broken: int = state.get("broken", 0)
        self._unit = kind_of(config.model).unit
        self._noise = SmoothedNoiseScale(**state.get("noise_scale", {}))
        self._config, self._workdir, self._skipped = config, workdir, skipped
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._first_step = first_step
        self._stack = contextlib.ExitStack()

    @property
    def state(self) -> dict[str, Any]:
        """What the next start needs, as plain numbers: for the checkpoint, and for ``state`` of the next recorder."""
        broken = {"broken": self.broken} if self.broken else {}
        return {"tokens": self.tokens, "noise_scale": dataclasses.asdict(self._noise)} | broken

    def __enter__(self) -> "Recorder":
        first, steps = self._first_step, self._config.train.steps
        self._writes = jax.process_index() == 0
        if self._writes:
            self._metrics = self._stack.enter_context(MetricsFile(self._workdir.metrics, resume_step=first))
            purge = first + 1 if first else None
            self._events = self._stack.enter_context(TensorBoardWriter(self._workdir.tensorboard, purge_step=purge))
        self.display = self._stack.enter_context(
            ProgressDisplay(
                steps,
                first_step=first,
                peak_flops=self._peak_flops,
                flops_per_token=self._flops_per_token,
                unit=self._unit,
                stream=None if self._writes else self._stack.enter_context(open(os.devnull, "w")),
            )
        )
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def finish(self, pending: Pending | None, more: Mapping[str, float] | None = None) -> None:
        """Waits for a step's scalars and records them, with what else is known of the step.

        Raises:
          UserError: the step was not finite, and the configuration says to stop.
        """
        if pending is None:
            return
        arrays = jax.device_get(dict(pending.metrics))
        scalars = {name: array.item() for name, array in arrays.items() if not array.ndim}
        stacked = {name: array.tolist() for name, array in arrays.items() if array.ndim}  # a number for each layer
        self.tokens += round(scalars["tokens"])
        if "noise_signal" in scalars:
            self._noise.update(scalars["noise_variance"], scalars["noise_signal"])
        noise = self._noise.tokens if "noise_signal" in scalars else None
        self.display.update(pending.step, loss=scalars["loss"], tokens=round(scalars["tokens"]), noise_scale=noise)
        speed = self.display.tokens_per_second
        row = {
            name: value for name, value in scalars.items() if name not in ("balance", "objective", "tokens", "broken")
        }
        row[self._unit], row["skipped"] = round(scalars["tokens"]), round(scalars["skipped"])
        if getattr(self._config.model, "moe", None) is not None:
            row["balance"] = scalars["balance"]
        if "broken" in scalars:
            self.broken += round(scalars["broken"])
            row["broken_seen"] = self.broken
        if noise is not None:
            row["noise_scale"] = noise
        row |= {f"{self._unit}_seen": self.tokens, **(more or {})}
        if speed is not None:
            row[f"{self._unit}_per_second"] = speed
            if self._peak_flops:
                row["mfu"] = speed * self._flops_per_token / self._peak_flops
        # A resumed or final step is recorded whatever the interval: the file must show where the run stands.
        due = pending.step % self._config.train.log_every == 0 or bool(more) or pending.step == self._config.train.steps
        if self._writes and due:
            self._metrics.write(pending.step, row | stacked)
            shown = row | {name: float(np.median(array)) for name, array in arrays.items() if array.ndim}
            self._events.write(pending.step, {name: value for name, value in shown.items() if math.isfinite(value)})
        if row["skipped"] > self._skipped:
            self._not_finite(pending, row)
        self._skipped = row["skipped"]

    def plot(self) -> None:
        """Draws ``loss.png`` of all rows so far.

        Raises:
          UserError: the disk is full, or the file cannot be written.
        """
        if not self._writes:
            return
        rows, path = read_metrics(self._workdir.metrics), self._workdir.loss_plot
        try:
            plot_loss(rows, path, title=self._workdir.path.name)
        except OSError as error:
            mend = "mend that (free some space?) and start again, the run resumes by itself"
            raise UserError(f"{path}: cannot be written: {error.strerror}; {mend}") from error

    def _not_finite(self, pending: Pending, row: Mapping[str, float]) -> None:
        loss, norm = row["loss"], row["gradient_norm"]
        what = f"step {pending.step}: loss {loss:.4g}, gradient norm {norm:.4g}"
        if self._config.train.nonfinite == "skip":
            self.display.log(f"{what}: not finite, step skipped ({row['skipped']} so far)")
            return
        mine = "" if jax.process_count() == 1 else f"_process_{jax.process_index()}"  # each has rows of its own
        path = Path(self._workdir.path) / f"nonfinite_step_{pending.step}{mine}.npz"
        np.savez_compressed(path, **dict(pending.batch))  # type: ignore[arg-type]
        raise UserError(
            f"{what}: not finite; its batch is in {path}; go on with --config.train.nonfinite=skip, or begin in "
            "another --workdir with a lower config.optimizer.learning_rate or with config.optimizer.clip_norm"
        )
