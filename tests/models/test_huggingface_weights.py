"""Safetensors in and out: the layout against a transcription by hand, damaged folders, and nothing half-written."""

import errno
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from ml.errors import UserError
from ml.models import Transformer, TransformerConfig, init_params
from ml.models.huggingface import load_config, load_params, safetensors_io, save_pretrained

GOLDEN = Path(__file__).parent / "golden"
CONFIG = TransformerConfig(
    vocab_size=48, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24, max_length=32
)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(lambda: init_params(Transformer(CONFIG), jax.random.key(0)))
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.fixture
def folder(params, tmp_path):
    save_pretrained(tmp_path / "model", CONFIG, params)
    return tmp_path / "model"


def rewrite(folder, change):
    """Applies ``change`` to the dict of tensors, through the reference implementation of the format."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_layout_by_hand(folder, params):
    """Each projection as the linear map y = W x of one layer, W stored [out, in], heads outermost in the rows."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    layers = params["layers"]
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        query = np.einsum("ehd->hde", layers["attention"]["query"]["kernel"][layer]).reshape(32, 16)
        np.testing.assert_array_equal(tensors[prefix + "self_attn.q_proj.weight"], query)
        value = np.einsum("ehd->hde", layers["attention"]["value"]["kernel"][layer]).reshape(16, 16)
        np.testing.assert_array_equal(tensors[prefix + "self_attn.v_proj.weight"], value)
        out = np.einsum("hde->ehd", layers["attention"]["out"]["kernel"][layer]).reshape(16, 32)
        np.testing.assert_array_equal(tensors[prefix + "self_attn.o_proj.weight"], out)
        for name in ("gate", "up", "down"):
            kernel = layers["mlp"][name]["kernel"][layer]
            np.testing.assert_array_equal(tensors[f"{prefix}mlp.{name}_proj.weight"], kernel.T)
        np.testing.assert_array_equal(
            tensors[prefix + "post_attention_layernorm.weight"], layers["mlp_norm"]["scale"][layer]
        )
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["unembed"]["kernel"].T)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params["embed"]["embedding"])


def test_round_trip_in_chunks_of_few_rows(params, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_io, "CHUNK_BYTES", 200)
    monkeypatch.setattr("ml.models.huggingface.save.CHUNK_BYTES", 200)
    save_pretrained(tmp_path / "model", CONFIG, params)
    assert_equal(load_params(tmp_path / "model", load_config(tmp_path / "model")), params)


def test_shards(params, tmp_path):
    target = tmp_path / "model"
    save_pretrained(target, CONFIG, params, max_shard_size=4000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    stored = {}
    for file in files:
        shard = safetensors.numpy.load_file(target / file)
        assert all(index["weight_map"][name] == file for name in shard)
        assert sum(array.nbytes for array in shard.values()) <= 4000
        stored |= shard
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in stored.values())
    assert_equal(load_params(target, CONFIG), params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(params, tmp_path, dtype):
    save_pretrained(tmp_path / "model", CONFIG, params, dtype=dtype)
    values = json.loads((tmp_path / "model/config.json").read_text())
    assert values["dtype"] == values["torch_dtype"] == dtype
    loaded = load_params(tmp_path / "model", CONFIG)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded)} == {dtype}
    assert_equal(loaded, jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params))
    wide = load_params(tmp_path / "model", CONFIG, dtype=jnp.float32)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(wide)} == {"float32"}


def test_sharded_placement(folder, params):
    mesh = jax.make_mesh((8,), ("fsdp",))
    seen = []

    def place(path):
        seen.append(path)
        axis = {"embed/embedding": 1, "layers/mlp/up/kernel": 2}.get(path)
        spec = PartitionSpec() if axis is None else PartitionSpec(*([None] * axis), "fsdp")
        return NamedSharding(mesh, spec)

    loaded = load_params(folder, CONFIG, sharding=place)
    assert_equal(loaded, params)
    assert sorted(seen) == sorted({"/".join(key.key for key in keys) for keys, _ in jax.tree.leaves_with_path(params)})
    up = loaded["layers"]["mlp"]["up"]["kernel"]
    assert up.sharding.spec == PartitionSpec(None, None, "fsdp")
    assert up.addressable_shards[0].data.shape == (2, 16, 3)


def test_export_of_sharded_arrays(params, tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",))
    placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    kernel = placed["layers"]["mlp"]["up"]["kernel"]
    placed["layers"]["mlp"]["up"]["kernel"] = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    save_pretrained(tmp_path / "model", CONFIG, placed)
    assert_equal(load_params(tmp_path / "model", CONFIG), params)


def test_older_spellings(folder, params):
    """Names without the model's prefix, and buffers that are no weights."""

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    rewrite(folder, strip)
    assert_equal(load_params(folder, CONFIG), params)


def test_tied_checkpoint_that_repeats_or_contradicts_its_embedding(params, tmp_path):
    shutil.copytree(GOLDEN / "llama_llama3", tmp_path / "model")
    values = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(values | {"tie_word_embeddings": True}))
    config = load_config(tmp_path / "model")
    assert config.tie_embeddings
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_params(tmp_path / "model", config)

    save_pretrained(tmp_path / "same", CONFIG, params)
    rewrite(tmp_path / "same", lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    values = json.loads((tmp_path / "same/config.json").read_text())
    (tmp_path / "same/config.json").write_text(json.dumps(values | {"tie_word_embeddings": True}))
    assert "unembed" not in load_params(tmp_path / "same", load_config(tmp_path / "same"))


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _truncate_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def _lfs_pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _garbage(folder):
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>" * 20)


def _pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _empty(folder):
    (folder / "model.safetensors").unlink()


def _missing_shard(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-1.safetensors"}}))


def _bad_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')


def _outside_shard(folder):
    index = {"weight_map": {"x": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_names_absent_tensor(folder):
    index = {"weight_map": {"model.norm.bias": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _missing(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def _unexpected(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32, "f4")}))


def _wrong_shape(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": np.zeros(17, "f4")}))


def _quantized(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": np.zeros(16, "i1")}))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_truncate, "model.safetensors: cut short: "),
        (_truncate_header, "model.safetensors: cut short within its header"),
        (_lfs_pointer, "git lfs pull"),
        (_garbage, "model.safetensors: not a safetensors file"),
        (_pickle, "pytorch_model.bin: a pickle, which is never loaded; convert it"),
        (_empty, "neither model.safetensors nor model.safetensors.index.json"),
        (_missing_shard, "model-1.safetensors: no such file"),
        (_bad_index, "model.safetensors.index.json: malformed"),
        (_outside_shard, "elsewhere.safetensors: no such file"),
        (_index_names_absent_tensor, "lacks tensor model.norm.bias"),
        (_missing, "tensor model.layers.1.mlp.up_proj.weight is missing in model.safetensors"),
        (_unexpected, "model.safetensors: unexpected tensor model.layers.0.self_attn.q_proj.bias"),
        (_wrong_shape, "model.safetensors: tensor model.norm.weight has shape [17]; by config.json it must be [16]"),
        (_quantized, "model.safetensors: tensor model.norm.weight is stored as I8"),
    ],
)
def test_damaged_folder(folder, damage, named):
    damage(folder)
    with pytest.raises(UserError) as raised:
        load_params(folder, CONFIG)
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


def test_refuses_an_occupied_folder(folder, params):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="not empty"):
        save_pretrained(folder, CONFIG, params)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    save_pretrained(folder, CONFIG, params, max_shard_size=4000, overwrite=True)
    assert not (folder / "model.safetensors").exists(), "nothing of the old checkpoint may stay beside the new one"
    assert_equal(load_params(folder, CONFIG), params)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_disk_full_leaves_nothing(params, tmp_path, monkeypatch):
    real = safetensors_io.write

    def full(path, tensors):
        real(path, tensors[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ml.models.huggingface.save.write", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_pretrained(tmp_path / "model", CONFIG, params)
    assert list(tmp_path.iterdir()) == []


def test_interrupt_leaves_nothing(params, tmp_path, monkeypatch):
    def interrupted(path, tensors):
        raise KeyboardInterrupt

    monkeypatch.setattr("ml.models.huggingface.save.write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(tmp_path / "model", CONFIG, params)
    assert list(tmp_path.iterdir()) == []


def test_params_of_another_architecture(params, tmp_path):
    lacking = {key: value for key, value in params.items() if key != "unembed"}
    with pytest.raises(UserError, match="params lack unembed/kernel"):
        save_pretrained(tmp_path / "model", CONFIG, lacking)
    with pytest.raises(UserError, match="params hold extra/kernel"):
        save_pretrained(tmp_path / "model", CONFIG, params | {"extra": {"kernel": np.zeros(2)}})
    wrong = params | {"final_norm": {"scale": np.zeros(3, np.float32)}}
    with pytest.raises(UserError, match=r"final_norm/scale has shape \[3\]; the architecture wants \[16\]"):
        save_pretrained(tmp_path / "model", CONFIG, wrong)
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_files(params, tmp_path):
    tokens = [{"content": "<|endoftext|>", "id": 0, "special": True}]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"added_tokens": tokens}))
    save_pretrained(tmp_path / "model", CONFIG, params, path)
    written = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    assert written["eos_token"] == "<|endoftext|>" and written["tokenizer_class"] == "PreTrainedTokenizerFast"
    values = json.loads((tmp_path / "model/config.json").read_text())
    assert (values["eos_token_id"], values["bos_token_id"]) == (0, None)

    path.write_text(json.dumps({"added_tokens": [*tokens, {"content": "<|im_end|>", "id": 5}]}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    save_pretrained(tmp_path / "chat", CONFIG, params, path)
    assert json.loads((tmp_path / "chat/config.json").read_text())["eos_token_id"] == 5

    path.write_text(json.dumps({"added_tokens": [{"content": "<|endoftext|>", "id": 48}]}))
    with pytest.raises(UserError, match="token id 48, but the model's vocab_size is 48"):
        save_pretrained(tmp_path / "other", CONFIG, params, path)
    with pytest.raises(UserError, match=r"nowhere.json: cannot be read"):
        save_pretrained(tmp_path / "other", CONFIG, params, tmp_path / "nowhere.json")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("size", ["5 apples", "0", "-1GB", ""])
def test_shard_size_is_checked(params, tmp_path, size):
    with pytest.raises(UserError, match="max_shard_size"):
        save_pretrained(tmp_path / "model", CONFIG, params, max_shard_size=size)
