"""Program of ``test_checkpoint_processes.py``: one of two processes that save and restore a sharded state together."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ml.checkpoint import CheckpointConfig, Checkpointer


def value_of(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=(16, 4)).astype(np.float32)


def main() -> None:
    workdir, port, process = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    mesh = jax.make_mesh((8,), ("data",))
    sharding = NamedSharding(mesh, P("data"))

    def state_of(step):
        value = value_of(step)
        return {
            "w": jax.make_array_from_callback(value.shape, sharding, lambda index: value[index]),
            "step": jax.device_put(jnp.int32(step), NamedSharding(mesh, P())),
        }

    with Checkpointer(workdir, CheckpointConfig(every=1, keep=2)) as checkpointer:
        latest = checkpointer.latest_step()
        step = 0
        if latest is not None:
            restored = checkpointer.restore(state_of(0))
            step = restored.step
            for shard in restored.state["w"].addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), value_of(step)[shard.index])
            assert restored.data_state == {"step": step}
        print(f"latest={latest} restored={step}", flush=True)
        for next_step in range(step + 1, step + 4):
            checkpointer.save(next_step, state_of(next_step), {"step": next_step})


if __name__ == "__main__":
    main()
