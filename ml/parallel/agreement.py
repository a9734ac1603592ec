"""What one process knows, all processes come to know at the same step."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Agreement:
    """The largest of the processes' numbers, one step late, without waiting for anything.

    Each step every process sends a number; the maximum over all devices is computed after that step's own work, and is
    read when the next step was sent. All processes call `exchange` equally often, so all read the same value at the same
    call.
    """

    def __init__(self, mesh: Mesh):
        """Nothing is computed where one process has all of ``mesh``."""
        self._alone = all(device.process_index == jax.process_index() for device in mesh.devices.flat)
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._size = mesh.size
        self._largest = jax.jit(jnp.max)
        self._sent: jax.Array | None = None

    def exchange(self, mine: int) -> int:
        """Sends ``mine``; returns what was agreed on the numbers of the call before (alone: ``mine`` itself).

        Args:
          mine: not negative.

        Returns:
          The maximum; 0 at the first call.
        """
        if self._alone:
            return mine
        before = self._sent
        mine_on_all = np.full(self._size, mine, np.int32)
        numbers = jax.make_array_from_callback(mine_on_all.shape, self._sharding, mine_on_all.__getitem__)
        self._sent = self._largest(numbers)
        return 0 if before is None else int(jax.device_get(before))
