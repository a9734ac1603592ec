"""Records: outcomes as JSON files, each with the command, device and versions that it was made with."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from ml.config import build, to_dict
from ml.errors import UserError
from ml.studies.outcome import Budget, Outcome


@dataclasses.dataclass(frozen=True)
class Record:
    """A study's outcome with its circumstances.

    Attributes:
      study: its name.
      budget: it was run with.
      command: that makes it again.
      device: in words.
      versions: of Python and packages.
      seconds: that the study took.
      outcome: what it found.
    """

    study: str
    budget: Budget
    command: str
    device: str
    versions: Mapping[str, str]
    seconds: float
    outcome: Outcome

    @property
    def stem(self) -> str:
        """The name of its files, without the ending; each budget has files of its own."""
        return self.study if self.budget == "cpu" else f"{self.study}_{self.budget}"


def write_record(record: Record, folder: Path) -> Path:
    """Writes ``folder/STUDY.json``, whole or not at all, and returns its path."""
    path = folder / f"{record.stem}.json"
    write_whole(path, json.dumps(to_dict(record), indent=1, allow_nan=False) + "\n")
    return path


def read_records(folder: Path) -> list[Record]:
    """All records in a folder, in the order of their names; none where there is no folder.

    Raises:
      UserError: a file that is not a record.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}); delete it and run its study again") from None
        if not isinstance(values, dict):
            raise UserError(f"{path}: not a study's record; move it elsewhere")
        records.append(build(Record, values, str(path)))
    return records


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all; makes the folder it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
