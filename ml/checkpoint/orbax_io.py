"""The only place that calls Orbax (its v1 API): one asynchronous save, one load, and its logging turned down."""

import logging
from typing import Any, Protocol

import jax
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

# Orbax saves to such a folder beside the checkpoint and renames it at the end.
TEMPORARY = ".orbax-checkpoint-tmp"


class Saving(Protocol):
    """A save that goes on in the background."""

    def result(self) -> None:
        """Waits for the end; raises what went wrong."""


def start_save(path: epath.Path, arrays: dict[str, Any]) -> Saving:
    """Starts to write nested dicts of arrays; when it returns, the arrays may be donated or overwritten.

    Trained float arrays hardly compress, and compression would take the cores that the training needs: it is off.
    """
    _turn_down_logging()
    context = ocp.Context()
    context.array_options.saving.use_compression = False
    with context:
        return ocp.save_async(path, arrays)


def load(path: epath.Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Reads the arrays that ``wanted`` names, into its shapes, dtypes and shardings; others stay on the disk."""
    _turn_down_logging()
    if not jax.tree.leaves(wanted):
        return {}
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    with context:
        return ocp.load(path, wanted)  # type: ignore[return-value]


def _not_orbax_chatter(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.CRITICAL or "/orbax/" not in record.pathname


def _turn_down_logging() -> None:
    """Drops Orbax's own records, pages of them for each save, and traces of what it raises to us anyway."""
    logging.getLogger("absl").addFilter(_not_orbax_chatter)  # the same filter is added only once
