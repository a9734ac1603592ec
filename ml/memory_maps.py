"""The memory maps of a process: programs for CPUs take hundreds each, and where there are none left, XLA aborts."""

from pathlib import Path

from ml.errors import UserError

_USED, _LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
# Several programs may be on their way when the last check was passed.
_NEARLY_FULL, _FULL = 0.88, 0.95


def used_share() -> float:
    """Of the memory maps that Linux grants a process; 0 elsewhere."""
    try:
        return _USED.read_bytes().count(b"\n") / int(_LIMIT.read_text())
    except OSError:
        return 0.0


def nearly_full() -> bool:
    """Whether it is time to do with fewer programs."""
    return used_share() > _NEARLY_FULL


def check_room() -> None:
    """Says so while there is still room; LLVM would end the process.

    Raises:
      UserError: nearly all are used.
    """
    if (used := used_share()) > _FULL:
        raise UserError(
            f"{used:.0%} of the memory maps that this process may have are used, and each compiled program takes "
            "hundreds: raise the limit (sudo sysctl -w vm.max_map_count=262144), or have fewer programs compiled "
            "(lower --max_running or --token_budget, and use one engine in a process)"
        )
