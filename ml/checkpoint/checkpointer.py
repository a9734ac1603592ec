"""Saves the training state in the background and restores the newest checkpoint that is whole."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ml.checkpoint import directory as folder
from ml.checkpoint import leaves, manifest, orbax_io
from ml.checkpoint.config import CheckpointConfig
from ml.errors import UserError

State = TypeVar("State")
_log = logging.getLogger(__name__)
_PARTS_TIMEOUT = 600.0  # seconds that the pruning waits for the other processes' manifests


@dataclasses.dataclass(frozen=True)
class Restored(Generic[State]):
    """A restored checkpoint: number of finished steps, the state on the wanted shardings, where the data stood."""

    step: int
    state: State
    data_state: Any


class Checkpointer:
    """The checkpoints of one training run, in ``workdir/checkpoints/<step>/``.

    All processes of a run make one each and call the same methods in the same order. A context manager: leaving it
    waits for the save under way.

    Example::

      with Checkpointer(workdir, CheckpointConfig(every=100)) as checkpointer:
          if checkpointer.latest_step() is not None:
              restored = checkpointer.restore(abstract_state)
          ...
          checkpointer.save(step, state, data_state)
    """

    def __init__(self, workdir: str | os.PathLike[str], config: CheckpointConfig | None = None) -> None:
        """Opens the folder, makes it where missing and removes what an interrupted save left.

        Raises:
          UserError: another process is writing checkpoints there, or the folder cannot be made.
        """
        self.config = config or CheckpointConfig()
        self.directory = locate(workdir, create=True)
        self._process, self._processes = jax.process_index(), jax.process_count()
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saved: set[int] = set()
        self._lock: Any = None
        if self._process == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._take_lock()
                folder.clean(self.directory)
            except OSError as error:
                raise UserError(
                    f"{self.directory}: {error.strerror or error}; choose another --workdir or mend that"
                ) from error

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except Exception as error:
            if kind is None:
                raise
            _log.error("%s", error)  # the first error is the one to see

    def save(self, step: int, state: Any, data_state: Mapping[str, Any] | None, *, force: bool = False) -> bool:
        """Starts to save if ``step`` is a multiple of ``config.every``, or always with ``force``.

        Returns as soon as ``state`` may be donated: its arrays have been copied, or are held until they are written.
        Waits for the previous save first. A step that this object has saved already is not saved again.

        Args:
          step: number of finished steps.
          state: any pytree of arrays, sharded in any way.
          data_state: where the data stream stands, as JSON can hold it; the same on every process.

        Returns:
          Whether a save was started.

        Raises:
          UserError: this save could not start, or the previous one failed (disk full...).
        """
        self._raise_failure(block=False)
        if step in self._saved or not (force or step % self.config.every == 0):
            return False
        self.wait()
        data = json.loads(json.dumps(data_state))  # a copy as of now; refuses what JSON cannot hold
        described = leaves.specs(state)
        checkpoint = self.directory / str(step)
        with self._failures_explained(step):
            if self._process == 0:
                for old in folder.steps(self.directory):
                    if old >= step:
                        folder.set_aside(self.directory, old, "superseded")
                folder.delete(self.directory, step)
                folder.mark(self.directory, step)
            self._agree(step)
            saving = orbax_io.start_save(checkpoint, leaves.to_stored(state))
        part = manifest.Manifest(step, self._processes, {})
        if self._process == 0:
            part = dataclasses.replace(part, leaves=described, data_state=data)
        self._pending = step, self._pool.submit(self._commit, step, saving, part)
        self._saved.add(step)
        return True

    def wait(self) -> None:
        """Waits for the save under way, if any; after it the checkpoint is whole.

        Raises:
          UserError: it failed.
        """
        self._raise_failure(block=True)

    def latest_step(self) -> int | None:
        """The newest completed step, or ``None`` to begin anew. Whether its files are intact `restore` finds out."""
        known = folder.steps(self.directory) if self._process == 0 else []
        step = self._agree(known[-1] if known else -1)
        return None if step < 0 else step

    def restore(self, abstract_state: State, step: int | None = None) -> Restored[State]:
        """Restores ``step``, or the newest checkpoint that is whole, onto the shardings of ``abstract_state``.

        Args:
          abstract_state: the state as arrays or ``jax.ShapeDtypeStruct`` (such as ``jax.eval_shape`` gives), with the
            wanted shardings, on any mesh; a leaf without one goes to the default device.
          step: ``None`` takes the newest; damaged ones are named in a warning, set aside and passed over.

        Raises:
          UserError: there is no whole checkpoint, or it differs from ``abstract_state`` in structure, shape or dtype.
        """
        self.wait()
        skipped: list[str] = []
        tried: set[int] = set()
        while (candidate := self._next_candidate(step, tried)) is not None:
            tried.add(candidate)
            problem = self._problem(candidate)
            if problem is None:
                self._saved = {saved for saved in self._saved if saved <= candidate}
                return self._load(candidate, abstract_state)
            skipped.append(f"{candidate}: {problem}")
            if step is None and self._process == 0:
                _log.warning(
                    "checkpoint %s/%d is not whole (%s); trying an older one", self.directory, candidate, problem
                )
                try:
                    folder.set_aside(self.directory, candidate, "damaged")
                except OSError as error:
                    _log.warning("checkpoint %s/%d stays in place: %s", self.directory, candidate, error.strerror)
        others = [str(other) for other in folder.steps(self.directory) if other not in tried]
        if step is not None and not skipped:
            raise UserError(f"{self.directory} has no checkpoint {step}; there are: {', '.join(others) or 'none'}")
        if step is not None:
            raise UserError(
                f"checkpoint {self.directory}/{skipped[0]}; restore another: {', '.join(others) or 'there is none'}"
            )
        if skipped:
            raise UserError(f"{self.directory} has no whole checkpoint ({'; '.join(skipped)}); begin in a new workdir")
        raise UserError(f"{self.directory} has no checkpoint; train first, or check the folder's name")

    def close(self) -> None:
        """Waits for the save under way and lets go of the folder. Harmless when repeated.

        Raises:
          UserError: the save failed.
        """
        try:
            self._raise_failure(block=True)
        finally:
            self._pool.shutdown()
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def _commit(self, step: int, saving: orbax_io.Saving, part: manifest.Manifest) -> None:
        """In the background: waits for Orbax, then makes the checkpoint whole and removes the ones beyond `keep`."""
        checkpoint = self.directory / str(step)
        saving.result()
        files = manifest.list_files(checkpoint, self._process, self._processes)
        manifest.write(checkpoint, self._process, dataclasses.replace(part, files=files))
        if self._process == 0 and self._all_parts_written(checkpoint):
            folder.unmark(self.directory, step)
            known = folder.steps(self.directory)
            for old in known[: -self.config.keep]:
                if not (self.config.keep_every and old % self.config.keep_every == 0):
                    folder.delete(self.directory, old)

    def _all_parts_written(self, checkpoint: epath.Path) -> bool:
        end = time.monotonic() + _PARTS_TIMEOUT
        while not folder.is_committed(checkpoint):
            if time.monotonic() > end:
                _log.warning("checkpoint %s: another process did not finish it; older ones are kept", checkpoint)
                return False
            time.sleep(0.2)
        return True

    def _raise_failure(self, block: bool) -> None:
        if self._pending is None or not (block or self._pending[1].done()):
            return
        step, saving = self._pending
        self._pending = None
        with self._failures_explained(step):
            saving.result()

    @contextlib.contextmanager
    def _failures_explained(self, step: int) -> Iterator[None]:
        """Gives the space of a failed save back, and turns the disk's errors into what the user can do about them."""
        try:
            yield
        except Exception as error:
            self._saved.discard(step)
            if self._process == 0:
                try:
                    folder.delete(self.directory, step)
                except OSError as cleaning:
                    _log.warning("the rest of checkpoint %d stays until the next start: %s", step, cleaning.strerror)
            reason = disk_error(error)
            if reason is None:
                raise
            raise self._not_saved(step, reason) from error

    def _not_saved(self, step: int, reason: str) -> UserError:
        free = ""
        if manifest.is_local(self.directory) and self.directory.exists():
            free = f" ({shutil.disk_usage(self.directory).free / 1e9:.2f} GB free now)"
        kept = folder.steps(self.directory)
        mend = "free some space or lower checkpoint.keep" if reason in _FULL else "mend that"
        return UserError(
            f"checkpoint {self.directory}/{step} could not be saved: {reason}{free}; {mend}, then start again:"
            f" the newest whole checkpoint is {kept[-1] if kept else 'none'}"
        )

    def _next_candidate(self, step: int | None, tried: set[int]) -> int | None:
        candidate = -1
        if self._process == 0:
            known = [one for one in folder.steps(self.directory) if one not in tried and step in (None, one)]
            candidate = known[-1] if known else -1
        candidate = self._agree(candidate)
        return None if candidate < 0 else candidate

    def _problem(self, step: int) -> str | None:
        """Why a checkpoint is not whole. The processes share the reading and all come to the same answer."""
        problem = None
        try:
            saved_by = manifest.read(self.directory / str(step)).processes
            mine = range(self._process, saved_by, self._processes)
            manifest.verify(self.directory / str(step), mine, content=self.config.verify)
        except manifest.NotWhole as error:
            problem = str(error)
        if self._processes > 1:
            bad = multihost_utils.process_allgather(np.int32(problem is not None))
            if np.any(bad) and problem is None:
                problem = f"process {int(np.argmax(bad))} found damage"
        return problem

    def _load(self, step: int, abstract_state: State) -> Restored[State]:
        checkpoint = self.directory / str(step)
        saved = manifest.read(checkpoint)
        leaves.check(saved.leaves, leaves.specs(abstract_state), f"checkpoint {checkpoint}")
        stored = orbax_io.load(checkpoint, leaves.wanted_arrays(abstract_state))
        return Restored(saved.step, leaves.from_stored(stored, abstract_state), saved.data_state)

    def _agree(self, value: int) -> int:
        """Process 0's value, on every process."""
        if self._processes == 1:
            return value
        return int(multihost_utils.broadcast_one_to_all(np.int32(value)))

    def _take_lock(self) -> None:
        """A record lock: unlike flock's it is not inherited by forked data workers, which may outlive a killed run."""
        if not manifest.is_local(self.directory):
            return
        self._lock = open(self.directory / ".lock", "w")  # noqa: SIM115
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{self.directory}: another process is training there; stop it or choose another --workdir"
                ) from None
            self._lock = None  # a file system without locks


_FULL = ("disk full", "disk quota exceeded")


def disk_error(error: BaseException | None) -> str | None:
    """What the file system said, if it is why ``error`` was raised; storage libraries pass it on as text only."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        text = str(error)
        code = error.errno if isinstance(error, OSError) else None
        if code == errno.ENOSPC or "No space left on device" in text:
            return _FULL[0]
        if code == errno.EDQUOT or "Disk quota exceeded" in text:
            return _FULL[1]
        if isinstance(error, OSError):
            return (error.strerror or text).lower()
        for hint in ("Read-only file system", "Permission denied", "Input/output error"):
            if hint in text:
                return hint.lower()
        error = error.__cause__ or error.__context__
    return None


def locate(workdir: str | os.PathLike[str], create: bool = False) -> epath.Path:
    """The folder of checkpoints: ``workdir/checkpoints``, or ``workdir`` itself where it is such a folder."""
    path = epath.Path(workdir)
    if manifest.is_local(path):
        path = epath.Path(os.path.abspath(os.path.expanduser(path)))
    if not create and path.name == "checkpoints":
        return path
    return path / "checkpoints"
