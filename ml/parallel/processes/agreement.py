"""What one process knows, all processes come to know at the same step."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int


class Agreement:
    """The largest of the processes' numbers, one step late, without waiting for anything.

    Each step every process sends a number; the maximum over all devices is computed between two steps, and is read when
    the next step was sent. All processes call `exchange` equally often, so all read the same value at the same call.
    """

    def __init__(self, mesh: Mesh):
        """Nothing is computed where one process has all of ``mesh``."""
        self._alone = all(device.process_index == jax.process_index() for device in mesh.devices.flat)
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._size = mesh.size
        self._largest = jax.jit(_largest, donate_argnums=1)
        self._sent: jax.Array | None = None

    def exchange(self, mine: int, counter: Int[Array, ""]) -> tuple[int, Int[Array, ""]]:
        """Sends ``mine``; returns what was agreed on the numbers of the call before (alone: ``mine`` itself).

        The devices of a CPU may run programs that do not depend on one another at the same time, and two collective
        operations at once would get each other's data. So the exchange depends on a result of the step before it, and
        the step after it must depend on the exchange.

        Args:
          mine: not negative.
          counter: a scalar that the step before has put out, the same on all devices.

        Returns:
          The maximum (0 at the first call), and ``counter``, to be given to the next step.
        """
        if self._alone:
            return mine, counter
        before = self._sent
        mine_on_all = np.full(self._size, mine, np.int32)
        numbers = jax.make_array_from_callback(mine_on_all.shape, self._sharding, mine_on_all.__getitem__)
        self._sent, counter = self._largest(numbers, counter)
        return 0 if before is None else int(jax.device_get(before)), counter


def _largest(numbers: Int[Array, "devices"], counter: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    # Without the barrier the maximum could be taken before `counter` is there; without the addition of what is always
    # nothing `counter` would be handed through without waiting.
    numbers, counter = jax.lax.optimization_barrier((numbers, counter))
    largest = numbers.max()
    return largest, counter + jnp.minimum(largest, 0)
