"""Folders that are built once: whole or not there at all, however the building ends."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from ml.errors import UserError

_log = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Makes the folder ``target`` by calling ``build`` on an empty folder, unless it is there already.

    The content is written aside, then flushed, then renamed: a kill at any moment leaves either nothing or a folder
    that the next call throws away. Any number of processes may call this at once: on one machine, or on a shared
    filesystem with working locks, one builds and the others wait for it. Where locks do not work, each builds its own
    and the first to finish is kept; ``build`` must therefore be deterministic.

    Raises:
      UserError: the disk is full, or the folder cannot be written; nothing is left behind.
    """
    if _is_whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_name(target.name + ".lock")) as locked:
            if _is_whole(target):
                return target
            if target.exists():
                _log.warning("%s is damaged and is built anew", target)
                shutil.rmtree(target)
            if locked:  # whoever left these is dead: the lock is ours
                for leftover in target.parent.glob(target.name + ".partial-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            _build_aside(target, build)
    except OSError as error:
        if error.errno in _DISK_FULL:
            mend = "free space there, or set data.cache_dir to a folder on another disk"
            raise UserError(f"{target.parent}: disk full while preparing data: {mend}") from error
        reason = error.strerror or str(error)
        raise UserError(
            f"{target.parent}: cannot be written ({reason}): set data.cache_dir to another folder"
        ) from error
    return target


def _build_aside(target: Path, build: Callable[[Path], None]) -> None:
    partial = target.with_name(f"{target.name}.partial-{socket.gethostname()}-{os.getpid()}")
    partial.mkdir()
    try:
        build(partial)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        sizes = {path.relative_to(partial).as_posix(): path.stat().st_size for path in files}
        (partial / _MANIFEST).write_text(json.dumps(sizes, indent=2))
        for path in [*files, partial / _MANIFEST]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        try:
            partial.rename(target)
        except OSError:
            if not _is_whole(target):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_whole(target: Path) -> bool:
    """Whether every file that the manifest names is there at its full size."""
    try:
        sizes = json.loads((target / _MANIFEST).read_text())
        return all((target / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Holds an exclusive lock, which the system drops when the process dies; yields False where there are no locks."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            yield False
            return
        yield True
