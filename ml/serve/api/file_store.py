"""Uploaded files and results, in a folder that lives as long as the server."""

import dataclasses
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any

from ml.serve.api.errors import ApiError


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """A file, and what the API says of it."""

    id: str
    name: str
    purpose: str
    path: Path
    created: int

    @property
    def card(self) -> dict[str, Any]:
        """As the API shows it."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.path.stat().st_size,
            "created_at": self.created,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
            "expires_at": None,
        }


class FileStore:
    """Files by id."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="megabatch-files-")
        self._files: dict[str, StoredFile] = {}

    def new(self, name: str, purpose: str) -> StoredFile:
        """An empty file; it is not in the list before `add`."""
        file_id = f"file-{secrets.token_hex(12)}"
        path = Path(self._folder.name, file_id)
        path.touch()
        return StoredFile(file_id, name, purpose, path, int(time.time()))

    def add(self, file: StoredFile) -> None:
        """Lets clients see a file."""
        self._files[file.id] = file

    def all(self) -> list[StoredFile]:
        """Oldest first."""
        return list(self._files.values())

    def get(self, file_id: str) -> StoredFile:
        """Raises `ApiError` if there is none."""
        if file_id not in self._files:
            raise ApiError(404, f"there is no file {file_id!r}", param="file_id", code="file_not_found")
        return self._files[file_id]

    def delete(self, file_id: str) -> None:
        """Likewise; the file is gone."""
        file = self.get(file_id)
        del self._files[file_id]
        file.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Deletes all."""
        self._files.clear()
        self._folder.cleanup()


def page(cards: list[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """A page of a list, the part behind the card with the id ``after``.

    Raises:
      ApiError: there is no such card.
    """
    if after is not None:
        places = [i for i, card in enumerate(cards) if card["id"] == after]
        if not places:
            raise ApiError(400, f"after: there is no {after!r} in the list", param="after")
        cards = cards[places[0] + 1 :]
    shown = cards[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(cards) > limit,
    }
