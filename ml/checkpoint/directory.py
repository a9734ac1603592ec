"""The folder of checkpoints: ``checkpoints/<step>/``, and what marks a step that is being written or deleted.

A file ``<step>.unfinished`` stands beside a step from before its first byte is written until after it became whole, and
from before its first byte is deleted until after the last. Whatever has that mark when no process works on it is a
leftover. A step that has no mark and is not whole was damaged later: it is reported and set aside, never deleted.
"""

import logging

from etils import epath

from ml.checkpoint import manifest, orbax_io

_log = logging.getLogger(__name__)
_MARK = ".unfinished"


def steps(directory: epath.Path) -> list[int]:
    """The steps that were once completed, oldest first; they may have been damaged since."""
    if not directory.exists():
        return []
    names = {entry.name for entry in directory.iterdir()}
    numbers = [int(name) for name in names if name.isdigit()]
    return sorted(step for step in numbers if f"{step}{_MARK}" not in names or is_committed(directory / str(step)))


def is_committed(checkpoint: epath.Path) -> bool:
    """Whether every process put its manifest; says nothing about the files themselves."""
    try:
        for process in range(1, manifest.read(checkpoint).processes):
            manifest.read(checkpoint, process)
    except manifest.NotWhole:
        return False
    return True


def mark(directory: epath.Path, step: int) -> None:
    """Leaves the sign that this step is not whole: it is being written or deleted."""
    (directory / f"{step}{_MARK}").write_text("")


def unmark(directory: epath.Path, step: int) -> None:
    """Takes the sign away."""
    (directory / f"{step}{_MARK}").unlink(missing_ok=True)


def delete(directory: epath.Path, step: int) -> None:
    """Deletes a step so that an interruption leaves a marked leftover and nothing that looks whole."""
    checkpoint = directory / str(step)
    mark(directory, step)
    if checkpoint.exists():
        manifest.path_of(checkpoint, 0).unlink(missing_ok=True)
        checkpoint.rmtree()
    for entry in list(directory.iterdir()):
        if entry.name.startswith(f"{step}{orbax_io.TEMPORARY}"):
            entry.rmtree()
    unmark(directory, step)


def clean(directory: epath.Path) -> None:
    """Removes what interrupted saves and deletions left. Only for the one process that writes here."""
    names = [entry.name for entry in directory.iterdir()]
    for name in names:
        number = name.removesuffix(_MARK)
        if name.endswith(_MARK) and number.isdigit():
            if is_committed(directory / number):
                unmark(directory, int(number))
            else:
                delete(directory, int(number))
        elif orbax_io.TEMPORARY in name and name.split(".")[0].isdigit():
            entry = directory / name
            if entry.exists():
                entry.rmtree()


def set_aside(directory: epath.Path, step: int, why: str) -> None:
    """Renames a step that is damaged, or of a course that was given up, so that no one takes it for the newest."""
    final = directory / f"{step}.{why}"
    if final.exists():
        final.rmtree()
    (directory / str(step)).rename(final)
    _log.warning("checkpoint %s/%d is %s; renamed to %s", directory, step, why, final.name)
