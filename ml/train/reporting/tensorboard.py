"""TensorBoard event files."""

import errno
import os
import pathlib
import time
from collections.abc import Mapping

from ml.errors import UserError


class TensorBoardWriter:
    """Writes scalars for TensorBoard.

    Writes happen in the calling thread, into a buffer of the file: tensorboardX's own `SummaryWriter` hands them to a
    thread whose death (of a full disk, say) would leave the caller waiting for ever.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, purge_step: int | None = None, flush_seconds: float = 10.0
    ):
        """Starts an event file of its own in ``directory``.

        Args:
          directory: created if missing.
          purge_step: on resume, the first step to be written again: TensorBoard then hides what an earlier run wrote
            from that step on.
          flush_seconds: longest time that an event may stay in memory.

        Raises:
          UserError: the disk is full, or the directory cannot be written.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._session_log = event_pb2.Event, event_pb2.SessionLog
        self._summary = summary_pb2.Summary
        self._directory = pathlib.Path(directory)
        self._flush_seconds = flush_seconds
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            # The writer's file names carry whole seconds only: two starts within one second must not share a file.
            earlier = len(list(self._directory.iterdir()))
            self._writer = EventsWriter(str(self._directory / "events"), f".{earlier:04d}")
            if purge_step is not None:
                start = self._session_log(status=self._session_log.START)
                self._writer.write_event(self._event(wall_time=time.time(), step=purge_step, session_log=start))
            self._writer.flush()
        except OSError as error:
            raise self._write_error(error) from error
        self._flushed = time.monotonic()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records ``scalars``, tag -> value, at ``step``.

        Raises:
          UserError: the disk is full, or the file cannot be written.
        """
        values = [self._summary.Value(tag=tag, simple_value=float(value)) for tag, value in scalars.items()]
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        try:
            self._writer.write_event(event)
            if time.monotonic() - self._flushed >= self._flush_seconds:
                self._writer.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            raise self._write_error(error) from error

    def close(self) -> None:
        """Writes out what is left, and closes."""
        try:
            self._writer.close()
        except OSError as error:
            raise self._write_error(error) from error

    def __enter__(self) -> "TensorBoardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write_error(self, error: OSError) -> UserError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return UserError(f"{self._directory}: the disk is full; free some space and start again")
        return UserError(f"{self._directory}: cannot be written: {error.strerror}")
