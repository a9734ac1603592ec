"""Reads parameters out of a training checkpoint without the optimizer, for inference and conversion."""

import logging
import os
from typing import Any

import jax
import jax.numpy as jnp

from ml.checkpoint import directory as folder
from ml.checkpoint import leaves, manifest, orbax_io
from ml.checkpoint.checkpointer import locate
from ml.errors import UserError

_log = logging.getLogger(__name__)


def restore_params(
    workdir: str | os.PathLike[str],
    step: int | None = None,
    *,
    abstract: Any = None,
    dtype: Any = None,
    subtree: str = "params",
    verify: bool = True,
) -> tuple[int, Any]:
    """Reads one subtree of the saved state; nothing else is read, and nothing in the folder is changed.

    Args:
      workdir: a training run's folder, or its ``checkpoints`` folder.
      step: ``None`` takes the newest checkpoint that is whole.
      abstract: the wanted parameters as arrays or ``jax.ShapeDtypeStruct`` with shardings; ``None`` gives nested dicts
        of all that was saved, on the default device.
      dtype: casts floating parameters; ``None`` keeps the saved dtypes, and refuses an ``abstract`` with others.
      subtree: which part of the state, for example ``"ema"``.
      verify: whether to compare checksums of all files first.

    Returns:
      (number of finished steps, parameters).

    Raises:
      UserError: no whole checkpoint, no such subtree, or it lacks parameters that ``abstract`` wants.
    """
    directory = locate(workdir)
    known = folder.steps(directory)
    if not known:
        raise UserError(f"{directory} has no checkpoint; train first, or check the folder's name")
    if step is not None and step not in known:
        raise UserError(f"{directory} has no checkpoint {step}; there are: {', '.join(map(str, known))}")
    skipped = []
    for candidate in reversed(known) if step is None else [step]:
        checkpoint = directory / str(candidate)
        try:
            saved = manifest.read(checkpoint)
            manifest.verify(checkpoint, range(saved.processes), content=verify)
        except manifest.NotWhole as error:
            _log.warning("checkpoint %s is not whole (%s)", checkpoint, error)
            skipped.append(f"{candidate}: {error}")
            continue
        prefix = subtree + "/"
        held = {name.removeprefix(prefix): spec for name, spec in saved.leaves.items() if name.startswith(prefix)}
        where = f"checkpoint {checkpoint}, {subtree}"
        if not held:
            parts = sorted({name.split("/")[0] for name in saved.leaves})
            raise UserError(f"checkpoint {checkpoint} has no '{subtree}'; it has: {', '.join(parts)}")
        if abstract is None:
            abstract = leaves.from_specs(held)
        mend = "it was saved with another model configuration; use that one"
        leaves.check(held, leaves.specs(abstract), where, mend=mend, check_dtypes=dtype is None)
        wanted = {subtree: leaves.wanted_arrays(_as_saved(abstract, held), None if dtype is None else jnp.dtype(dtype))}
        stored = orbax_io.load(checkpoint, wanted)
        return candidate, leaves.from_stored(stored.get(subtree, {}), abstract)
    raise UserError(f"{directory} has no whole checkpoint ({'; '.join(skipped)}); train again or give another step")


def _as_saved(abstract: Any, held: leaves.Specs) -> Any:
    """``abstract`` with the saved dtypes, so that only ``dtype`` decides about casts."""
    described = [
        jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(held[name][1]), sharding=getattr(leaf, "sharding", None))
        for name, leaf in leaves.named_leaves(abstract).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), described)
