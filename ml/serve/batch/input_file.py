"""The requests of a job: an index of the lines of a file, which stay on disk until their turn comes."""

import array
from pathlib import Path

from ml.errors import UserError
from ml.serve.batch.lines import BatchLine, LineError, line_digest, read_line
from ml.serve.text.structured import FIELDS

_STRUCTURED = tuple(name.encode() for name in FIELDS)


class InputFile:
    """Lines of a file by index; empty ones do not count.

    Attributes:
      path: of the file.
      digests: of each line, see `line_digest`.
      structured: whether a line seems to ask for a structured output.
      errors: what is wrong with lines that are no requests, by index.
    """

    def __init__(self, path: Path):
        """Reads the file once.

        Raises:
          UserError: it cannot be read, or is empty.
        """
        self.path = path
        self.digests: list[bytes] = []
        self.errors: dict[int, LineError] = {}
        self.structured = False
        self._numbers, self._offsets = array.array("q"), array.array("q")
        try:
            self._file = path.open("rb")
            self._index()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        if not self.digests:
            raise UserError(f"{path}: is empty; give one request a line, in OpenAI's Batch file format")

    def __len__(self) -> int:
        return len(self.digests)

    def where(self, index: int) -> str:
        """File and line number, for messages."""
        return f"{self.path}:{self._numbers[index]}"

    def read(self, index: int) -> BatchLine:
        """A request.

        Raises:
          LineError: the line is none.
        """
        if index in self.errors:
            raise self.errors[index]
        self._file.seek(self._offsets[index])
        return read_line(self._file.readline())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _index(self) -> None:
        first: dict[str, int] = {}
        offset = 0
        for number, raw in enumerate(self._file, start=1):
            self.structured |= any(name in raw for name in _STRUCTURED)
            if raw.strip():
                try:
                    name = read_line(raw).custom_id
                    if name in first:
                        raise LineError(
                            f"custom_id: {name!r} is that of line {first[name]} already; each must be unique", name
                        )
                    first[name] = number
                except LineError as error:
                    self.errors[len(self.digests)] = error.with_traceback(None)
                self.digests.append(line_digest(number, raw))
                self._numbers.append(number)
                self._offsets.append(offset)
            offset += len(raw)
