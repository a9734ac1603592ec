"""Program of ``test_batches.py``: one of two processes that place batches on meshes that lie over both in many ways."""

import json
import sys

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from training_cases import ragged_batch

from ml.parallel import AXES, HealthConfig, Rules, loader_share, place_batch
from ml.parallel.processes.agreement import Agreement
from ml.parallel.processes.launch import join, launch_by_hand

# Degrees of data, fsdp and tensor, and which device comes where; process 0 has devices 0 to 3.
CASES = {
    "side by side": ((4, 2, 1), [0, 1, 2, 3, 4, 5, 6, 7]),
    "in turns": ((2, 4, 1), [0, 1, 4, 5, 2, 3, 6, 7]),
    "the same rows for both": ((2, 1, 4), [0, 1, 4, 5, 2, 3, 6, 7]),
    "all rows for both": ((1, 1, 8), [0, 1, 2, 3, 4, 5, 6, 7]),
    "backwards": ((8, 1, 1), [7, 6, 5, 4, 3, 2, 1, 0]),
}
MICROBATCHES, ROWS = 2, 16


def place(degrees: tuple[int, ...], order: list[int]) -> tuple[tuple[int, ...], int]:
    """Loads what the share says, places it, and compares every device's part with the batch itself."""
    devices = {device.process_index * 4 + i % 4: device for i, device in enumerate(jax.devices())}
    data, fsdp, tensor = degrees
    arranged = np.array([devices[number] for number in order]).reshape(1, data, fsdp, 1, 1, tensor)
    rules = Rules(Mesh(arranged, AXES, axis_types=(AxisType.Explicit,) * len(AXES)))
    parts, count = loader_share(rules)
    whole = {name: x.reshape(MICROBATCHES, ROWS, -1) for name, x in ragged_batch(MICROBATCHES * ROWS).items()}
    local = {
        name: x.reshape(MICROBATCHES, count, ROWS // count, -1)[:, list(parts)].reshape(-1, x.shape[-1])
        for name, x in whole.items()
    }
    for name, array in place_batch(local, rules, MICROBATCHES).items():
        assert array.shape == whole[name].shape and array.dtype == whole[name].dtype
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), whole[name][shard.index])
    return parts, count


def agree(process: int) -> list[int]:
    """What each call gives; process 1 sends 15 from the third on, process 0 sends 2 from the fifth on."""
    agreement = Agreement(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,)))
    counter = jax.jit(lambda: jax.numpy.int32(0))()
    counter = jax.device_put(counter, jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P()))
    given = []
    for call in range(1, 8):
        mine = (15 if call >= 3 else 0) if process else (2 if call >= 5 else 0)
        agreed, counter = agreement.exchange(mine, counter + 1)
        given.append(agreed)
    assert int(counter) == 7
    return given


def main() -> None:
    address, process = sys.argv[1], int(sys.argv[2])
    with join(launch_by_hand(address, 2, process), HealthConfig()):
        shares = {name: place(*case) for name, case in CASES.items()}
        print(json.dumps({"shares": shares, "agreed": agree(process)}), flush=True)


if __name__ == "__main__":
    main()
