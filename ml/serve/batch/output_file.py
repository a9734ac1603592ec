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
_BLOCK = 1 << 16


class OutputFile:
    """Appends records as lines of JSON. One process at a time.

    A torn write leaves an incomplete last line, which counts for nothing and which `mend` drops.
    """

    def __init__(self, path: Path, beginning: bytes):
        """Opens or creates the file; changes nothing that is in it.

        Args:
          path: of the file.
          beginning: of every line that is written here: an incomplete line that does not begin so is someone else's.

        Raises:
          UserError: it cannot be written, another process is writing it, or its last line is someone else's.
        """
        self.path = path
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
        self._end = self._last_line_end()
        torn = os.pread(self._descriptor, len(beginning), self._end)
        if not beginning.startswith(torn):
            os.close(self._descriptor)
            raise UserError(f"{path}: the last line is no answer to a batch, so this is another file: choose another")

    @property
    def torn(self) -> bool:
        """Whether the last line is incomplete."""
        return self._end < os.fstat(self._descriptor).st_size

    def records(self) -> Iterator[tuple[int, Any]]:
        """Line numbers and records of the whole lines that are there already.

        Raises:
          UserError: a line is not JSON.
        """
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.endswith(b"\n"):
                    return
                try:
                    yield number, json.loads(raw)
                except ValueError as error:
                    raise UserError(
                        f"{self.path}:{number}: is not JSON ({error}), so this is no output of a batch, or a damaged "
                        "one: choose another file, or remove that line"
                    ) from error

    def mend(self) -> None:
        """Drops an incomplete last line."""
        if self.torn:
            os.ftruncate(self._descriptor, self._end)

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

    def _last_line_end(self) -> int:
        """Where the last whole line ends."""
        end = os.fstat(self._descriptor).st_size
        while end:
            start = max(0, end - _BLOCK)
            found = os.pread(self._descriptor, end - start, start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
        return 0
