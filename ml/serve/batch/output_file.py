"""The answers of a job: a file to which whole lines are appended, and which tells after a crash what is done."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml.errors import UserError

_SYNC_SECONDS = 5.0


class OutputFile:
    """Appends records as lines of JSON. One process at a time; what a torn write left behind is dropped."""

    def __init__(self, path: Path):
        """Opens or creates the file, and drops an incomplete last line.

        Raises:
          UserError: it cannot be written, or another process is writing it.
        """
        self.path = path
        self.dropped = 0
        self._synced = time.monotonic()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise UserError(f"{path}: another job is writing it; wait for that, or choose another file") from None
        self._drop_torn_line()

    def records(self) -> Iterator[tuple[int, Any]]:
        """Line numbers and records that are there already.

        Raises:
          UserError: a line is not JSON.
        """
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    yield number, json.loads(raw)
                except ValueError as error:
                    raise UserError(
                        f"{self.path}:{number}: is not JSON ({error}), so this is no output of a batch, or a damaged "
                        "one: choose another file, or remove that line"
                    ) from error

    def append(self, record: Any) -> None:
        """Adds a line, in one piece; now and then makes sure that it is on the disk."""
        left = memoryview(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
        while left:  # a full disk may take a part; the next start drops it
            left = left[os.write(self._descriptor, left) :]
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Makes sure that all lines are on the disk."""
        os.fsync(self._descriptor)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Makes sure that all lines are on the disk, and lets others write."""
        self.sync()
        os.close(self._descriptor)

    def _drop_torn_line(self) -> None:
        size = end = os.fstat(self._descriptor).st_size
        block = 1 << 16
        while end:
            start = max(0, end - block)
            found = os.pread(self._descriptor, end - start, start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        self.dropped = size - end
        if self.dropped:
            os.ftruncate(self._descriptor, end)
