"""A folder that appears only when it is complete."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ml.errors import UserError


def check_vacant(folder: Path) -> None:
    """Raises `UserError` unless ``folder`` is absent or empty."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose another output folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: not empty; choose another output folder or remove it")


@contextlib.contextmanager
def appearing(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A directory to write into that becomes ``folder`` on success and vanishes on failure.

    Raises:
      UserError: ``folder`` is a file, or is not empty and ``overwrite`` is off, or the disk refuses (full...).
    """
    if not overwrite:
        check_vacant(folder)
    occupied = folder.is_dir() and any(folder.iterdir())
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
        yield partial
        partial.chmod(0o777 & ~_umask())
        for path in partial.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if occupied:
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
            folder.rename(old / "replaced")
            partial.rename(folder)
            shutil.rmtree(old)
        else:
            partial.rename(folder)  # replaces an empty directory
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}; nothing was left there") from error
    finally:
        if partial is not None and partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
