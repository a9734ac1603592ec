"""What a device of a ring needs, forward and backward, falls as the ring grows."""

import jax
import jax.numpy as jnp
import pytest

from ml.models.attention import AttentionLayer
from ml.parallel import MeshConfig, Rules
from ml.parallel.context import RingAttention


def per_device(shards, length=65536):
    """Bytes per device of one attention layer's gradient, compiled and not run."""
    rules = Rules.make(MeshConfig(1, sequence=shards), jax.devices()[:shards])
    layer = AttentionLayer(0, None, 0.125, None)

    def shape(heads, axis):
        place = rules.sharding("batch", "length", axis, "head_dim")
        return jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32, sharding=place)

    def loss(q, k, v):
        return jnp.square(RingAttention(None, rules.spec).attend(layer, q, k, v, None)[0]).sum()

    with jax.set_mesh(rules.mesh):
        shapes = shape(4, "heads"), shape(2, "kv_heads"), shape(2, "kv_heads")
        memory = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes


@pytest.mark.slow
def test_memory_per_device_falls_with_the_number_of_devices():
    """65536 tokens, 4 query and 2 key/value heads of 64, float32, MB per device: 355 on 2, 215 on 4, 114 on 8.

    Two devices keep less in flight than more do (there is no step between the first and the last). All include the
    scores of one pair of blocks, which do not depend on the length.
    """
    two, four, eight = (per_device(shards) for shards in (2, 4, 8))
    assert four < 0.65 * two
    assert eight < 0.55 * four
