"""What a step's batch is, as shapes and placements."""

from typing import Any

import jax

from ml.data import next_name, padding
from ml.parallel import Rules, batch_axes
from ml.train.config import ExperimentConfig
from ml.train.kinds import kind_of


def abstract_batch(config: ExperimentConfig, rules: Rules) -> dict[str, Any]:
    """What `ml.parallel.place_batch` makes of a batch of `ml.data`, as shapes and placements."""
    train, arrays = config.train, padding(config.data, 1)
    arrays |= {next_name(name): arrays[name] for name in kind_of(config.model).lookahead(config)}
    shape = (train.microbatches, train.batch_size // train.microbatches)

    def abstract(array: Any) -> jax.ShapeDtypeStruct:
        sharding = rules.sharding(*batch_axes(array.ndim))
        return jax.ShapeDtypeStruct((*shape, *array.shape[1:]), array.dtype, sharding=sharding)

    return {name: abstract(array) for name, array in arrays.items()}
