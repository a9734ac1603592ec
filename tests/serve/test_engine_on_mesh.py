"""An engine whose model is spread over devices writes what one device writes, each device keeping its part in place."""

import dataclasses

import engine_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import CONFIG, SMALL, assert_exact, engine, greedy_requests, prompts, weights
from jax.sharding import NamedSharding

from ml.errors import UserError
from ml.models import Transformer, init_params
from ml.models.quantization import quantize_params
from ml.parallel import MeshConfig, make_mesh
from ml.plan.collectives import collectives
from ml.serve import program
from ml.serve.api.embedder import Embedder
from ml.serve.engine import Engine
from ml.serve.placement import Placement, replica_meshes, serving_mesh
from ml.serve.sampling import SamplingParams
from pallas_kernels import absent

# Unlike the plain one's, its vocabulary divides, and heads are as many as devices.
WIDE = {"vocab_size": 64, "num_kv_heads": 4, "qkv_bias": True, "qk_norm": True, "tie_embeddings": True}


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setitem(engine_cases.ARCHITECTURES, "wide", WIDE)


def spread(name, tensor, **changes):
    return Engine(*weights(name), dataclasses.replace(SMALL, **changes), mesh=serving_mesh(tensor=tensor))


@pytest.mark.usefixtures("quick_compilation")
def test_each_device_keeps_its_heads_and_updates_them_in_place():
    """Prefixes are shared and computed once, and a prompt's samples copy its last page."""
    one = spread("wide", 4, share="always", cache_tokens=2**16)
    before = one._runner._state.cache
    prefix, asked = tuple(range(20, 34)), [SamplingParams(max_tokens=9, temperature=0.0, n=2)] * 2
    given = [prefix, (*prefix, 3, 1)]
    assert_exact("wide", given, asked, one.generate(given, asked))
    assert one.statistics.cached > 0
    assert "copy" in one._runner._programs
    after = one._runner._state.cache
    assert before.key.is_deleted()
    whole = after.key.shape
    assert whole[3] == 4
    assert [shard.data.shape for shard in after.key.addressable_shards] == [(*whole[:3], 1, whole[4])] * 4
    heads = one._runner._params["layers"]["attention"]["query"]["kernel"]
    assert {shard.data.shape for shard in heads.addressable_shards} == {(2, 32, 1, CONFIG.head_dim)}
    kind = program.Kind(4, None, planned=True)
    assert kind in one._runner._programs
    compiled = one._runner._programs[kind]
    memory = compiled.memory_analysis()
    if memory is not None:  # not every backend tells; what it tells is of one device
        assert memory.alias_size_in_bytes >= 2 * after.key.nbytes / 4
        assert memory.temp_size_in_bytes < after.key.nbytes / 4
    # Nothing crosses but Megatron's two sums in a layer, the embedding's, and the logits.
    sent = collectives(compiled.as_text(), one._runner._placement.mesh.shape)
    found = sorted((each.kind, each.axes, each.times) for each in sent)
    assert found == [
        ("all-gather", ("tensor",), 1),
        ("all-reduce", ("tensor",), 1),
        ("all-reduce", ("tensor",), 2),
        ("all-reduce", ("tensor",), 2),
    ]


def test_parameters_come_in_their_places_and_stay_there():
    config, params = weights("wide")
    place = Placement(config, serving_mesh(tensor=4))
    placed = place.params(params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (placed, place.params(placed))), strict=True))
    one = placed["embed"]["embedding"]
    assert {shard.data.shape for shard in one.addressable_shards} == {(16, 32)}
    assert place.of_leaf("embed/embedding") == one.sharding
    replicas = [Placement(config, mesh) for mesh in replica_meshes(serving_mesh(data=2, tensor=2))]
    everywhere = Placement(config, serving_mesh(data=2, tensor=2)).params(params)
    for replica in replicas:
        for mine, all_ in zip(*map(jax.tree.leaves, (replica.params(everywhere), everywhere)), strict=True):
            held = {s.device: s.data.unsafe_buffer_pointer() for s in all_.addressable_shards}
            assert mine.sharding.device_set == set(replica.mesh.devices.flat)
            assert all(s.data.unsafe_buffer_pointer() == held[s.device] for s in mine.addressable_shards)  # no copy
    few = Placement(CONFIG, serving_mesh(tensor=4))  # of 2 key/value heads each is on two devices
    kernel = weights()[1]["layers"]["attention"]["key"]["kernel"]
    for given in (kernel, jax.device_put(kernel, few.of_leaf("layers/attention/key/kernel"))):
        copied = few._put(("layers", "embed", "kv_heads", "head_dim"), given)
        assert {shard.data.shape for shard in copied.addressable_shards} == {(2, 32, 1, CONFIG.head_dim)}
        np.testing.assert_array_equal(copied, np.asarray(kernel)[:, :, [0, 0, 1, 1]])
    odd = Placement(CONFIG, serving_mesh(tensor=2))
    assert odd.of_leaf("embed/embedding").is_fully_replicated  # 61 tokens


@pytest.mark.parametrize(
    ("changes", "tensor", "message"),
    [
        ({}, 8, "tensor=8: 4 attention heads, .* choose one of 1, 2, 4, and"),
        ({"num_heads": 6, "num_kv_heads": 3}, 2, "tensor=2: .* 3 key/value heads .* choose one of 1, 3, 6, and"),
        ({"mlp_dim": 49}, 2, "tensor=2: .* an MLP of 49 .* choose one of 1, and"),
    ],
)
def test_refuses_a_model_that_does_not_divide(changes, tensor, message):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UserError, match=message):
        Placement(config, serving_mesh(tensor=tensor))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 16}, "tensor=16: there are 8 devices, room for 1 to 8; "),
        ({"data": 5, "tensor": 2}, "data=5: there are 8 devices, room for 1 to 4 of 2 devices each"),
        ({"tensor": 0}, "tensor=0: "),
    ],
)
def test_refuses_more_devices_than_there_are(sizes, message):
    with pytest.raises(UserError, match=message):
        serving_mesh(**sizes)


def test_one_device_is_no_mesh():
    assert serving_mesh() is None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tensor"), [("plain", 2), ("plain", 4), ("experts", 2), ("wide", 4)])
def test_greedy_text_is_that_of_the_whole_forward(name, tensor):
    """In company, with so little room that sequences lose their pages."""
    given, asked = prompts(20), greedy_requests(20, most_samples=2)
    one = spread(name, tensor, share="always", cache_tokens=60)
    for _ in range(2):
        assert_exact(name, given, asked, one.generate(given, asked))
    assert one.statistics.preemptions > 0
    assert one.statistics.cached > 0
    assert one._scheduler.memory.held == 0


@pytest.mark.slow
def test_all_kinds_of_drawing_are_those_of_one_device():
    given = prompts(6)
    asked = [
        SamplingParams(max_tokens=9, seed=3, top_p=0.9, top_k=20, n=2),
        SamplingParams(max_tokens=9, seed=4, presence_penalty=0.5, repetition_penalty=1.2, logit_bias={7: 2.0}),
        SamplingParams(max_tokens=5, temperature=0.0, logprobs=2, prompt_logprobs=3),
        SamplingParams(max_tokens=9, seed=6, min_p=0.05, min_tokens=3),
        SamplingParams(max_tokens=9, temperature=0.0, n=2, best_of=3),
        SamplingParams(max_tokens=9, seed=8),
    ]
    expected = engine("wide").generate(given, asked)
    got = spread("wide", 2).generate(given, asked)
    for mine, theirs in zip(got, expected, strict=True):
        assert [c.tokens for c in mine] == [c.tokens for c in theirs]
    for mine, theirs in zip(got[2][0].logprobs, expected[2][0].logprobs, strict=True):
        assert (mine.logprob, mine.rank) == (pytest.approx(theirs.logprob, abs=1e-4), theirs.rank)
    prompts_mine, prompts_theirs = (x[2][0].prompt_logprobs[1:] for x in (got, expected))
    assert [p.logprob for p in prompts_mine] == pytest.approx([p.logprob for p in prompts_theirs], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3fn"])
def test_a_quantized_cache_is_cut_with_its_scales(cache_dtype):
    given, asked = prompts(6), SamplingParams(max_tokens=9, temperature=0.0)
    expected = engine("wide", cache_dtype=cache_dtype).generate(given, asked)
    one = spread("wide", 4, cache_dtype=cache_dtype)
    assert one.generate(given, asked) == expected
    assert one._runner._state.cache.key_scale.addressable_shards[0].data.shape[2] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tensor"), [("wide", 4), ("plain", 4), ("experts", 2)])
def test_weights_of_8_bits_are_cut_with_their_scales(name, tensor):
    given, asked = prompts(6), SamplingParams(max_tokens=9, temperature=0.0, logprobs=0)
    config, params = weights(name)
    whole = quantize_params(config, params)
    expected = Engine(config, whole, SMALL).generate(given, asked)
    one = Engine(config, whole, SMALL, mesh=serving_mesh(tensor=tensor))
    for (mine,), (theirs,) in zip(one.generate(given, asked), expected, strict=True):
        assert mine.tokens == theirs.tokens
        assert [x.logprob for x in mine.logprobs] == pytest.approx([x.logprob for x in theirs.logprobs], abs=1e-3)
    kernel = one._runner._params["layers"]["attention"]["query"]["kernel"]
    assert kernel.values.addressable_shards[0].data.shape == (2, 32, 4 // tensor, 8)
    assert kernel.scale.addressable_shards[0].data.shape == (2, 1, 4 // tensor, 8)


@pytest.mark.slow
def test_nothing_is_compiled_after_the_warm_up():
    compiled = []

    def listen(name, seconds, **_):
        compiled.append(name) if name == "/jax/core/compile/backend_compile_duration" else None

    one = spread("plain", 2, share="always", max_running=3)
    one.warm_up()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for seed in range(3):
            one.generate(prompts(12, seed), greedy_requests(12, seed, most_samples=2))
        assert compiled == []
        assert one.statistics.compilations == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
def test_bits_depend_on_nothing_else_in_the_batch():
    given = prompts(6)
    asked = SamplingParams(max_tokens=9, temperature=0.0, logprobs=0)
    one = spread("wide", 2, invariant=True, share="always")
    together = one.generate(given, asked)
    assert [c.tokens for (c,) in together] == [one.generate([each], asked)[0][0].tokens for each in given]


@pytest.mark.slow
def test_embeddings_are_those_of_one_device():
    config, params = weights("wide")
    texts = [list(range(2, 20)), [5], [9, 8, 7]]
    for pooling in ("mean", "last"):
        expected = Embedder(config, params, pooling=pooling).embed(texts)
        got = Embedder(config, params, pooling=pooling, mesh=serving_mesh(data=2, tensor=2)).embed(texts)
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.slow
def test_the_kernels_compile_for_absent_tpus_within_the_map(absent_tpus):
    config = dataclasses.replace(CONFIG, head_dim=128, num_heads=8, num_kv_heads=4, vocab_size=64)
    settings = dataclasses.replace(SMALL, page_size=16, dtype=jnp.bfloat16)
    params = jax.jit(init_params, static_argnums=0)(Transformer(config), jax.random.key(0))
    runner = Engine(config, params, settings, mesh=serving_mesh(tensor=4))._runner
    mesh = make_mesh(MeshConfig(data=1, tensor=4), absent.devices("v5e", (2, 2)))

    def moved(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))

    runner._params, runner._state = jax.tree.map(moved, (runner._params, runner._state))
    runner._placement = Placement(config, mesh)
    runner._model = runner._model.clone(place=runner._placement.spec)
    for kind in (program.Kind(4, None), program.Kind(4, 16)):
        text = runner._compile(kind).as_text()
        assert "tpu_custom_call" in text
        assert {each.kind for each in collectives(text, mesh.shape)} == {"all-reduce", "all-gather"}
