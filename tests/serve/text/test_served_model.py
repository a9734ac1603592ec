"""Models as a folder holds them: how their texts begin and end. What may be wrong: tests/scripts/test_generate.py."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from ml.checkpoint.pretrained import save_workdir
from ml.data.tokenizer import Tokenizer
from ml.errors import UserError
from ml.models import Transformer, TransformerConfig, init_params
from ml.models.huggingface import save_pretrained
from ml.models.quantization import quantize_params
from ml.serve.placement import serving_mesh
from ml.serve.text import ServedModel
from ml.serve.text.served_model import WEIGHTS, serving_dtype

CONFIG = TransformerConfig(
    vocab_size=300, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24, max_length=64
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    params = init_params(Transformer(CONFIG), jax.random.key(0))
    Tokenizer.train(["Fünf große Äpfel. " * 20], 290).save(root / "tokenizer")
    tokenizer = root / "tokenizer/tokenizer.json"
    save_workdir(root / "run", CONFIG, params, tokenizer)
    experiment = json.loads((root / "run/experiment.json").read_text())
    (root / "run/experiment.json").write_text(json.dumps({**experiment, "data": {}}))
    save_pretrained(root / "hf", CONFIG, params, tokenizer)
    return root


def test_a_training_run_opens_texts_as_it_was_trained(root):
    model = ServedModel.load(root / "run")
    assert model.name == "run"
    assert model.opening == [model.tokenizer.bos_id]
    assert model.encode("Äpfel") == [model.tokenizer.bos_id, *model.tokenizer.encode("Äpfel")]
    assert model.stop_ids == {model.tokenizer.eos_id}
    with pytest.raises(UserError, match=r"'run' has no chat template.*--chat_template=FILE"):
        model.encode_chat([{"role": "user", "content": "x"}])


def test_a_hugging_face_folder_says_itself_how_texts_begin_and_end(root):
    model = ServedModel.load(root / "hf")
    assert model.opening == []
    assert model.encode("") == [model.tokenizer.bos_id]
    file = tokenizers.Tokenizer.from_file(str(root / "hf/tokenizer.json"))
    file.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", file.token_to_id("<|endoftext|>"))]
    )
    file.save(str(root / "hf/tokenizer.json"))
    (root / "hf/generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    model = ServedModel.load(root / "hf")
    assert model.opening == [model.tokenizer.bos_id]
    assert model.stop_ids == {model.tokenizer.eos_id, 7, 9}
    (root / "hf/generation_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"generation_config\.json"):
        ServedModel.load(root / "hf")
    (root / "hf/generation_config.json").unlink()


def test_chat(root, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    model = ServedModel.load(root / "run", chat_template=template)
    encode, end = model.tokenizer.encode, model.tokenizer.eos_id
    message = {"role": "user", "content": "große"}
    assert model.encode_chat([message]) == [*encode("user: große"), end, *encode("assistant: ")]
    assert model.encode_chat([message], add_generation_prompt=False) == [*encode("user: große"), end]


def test_weights_are_kept_as_asked(root):
    halves, whole = (ServedModel.load(root / "run", weights=each).params for each in ("bfloat16", "int8"))
    assert {leaf.dtype for leaf in jax.tree.leaves(halves)} == {jnp.dtype("bfloat16")}
    floats = ServedModel.load(root / "run", weights="float32").params
    jax.tree.map(np.testing.assert_array_equal, whole, quantize_params(CONFIG, floats))
    # What was saved is rounded, not what a float of 16 bits makes of it.
    assert whole["layers"]["attention_norm"]["scale"].dtype == jnp.float32
    with pytest.raises(UserError, match=r"weights='int4'.*did you mean 'int8'\?"):
        ServedModel.load(root / "run", weights="int4")
    assert [serving_dtype(weights) for weights in WEIGHTS] == [jnp.float32, jnp.bfloat16, serving_dtype()]


@pytest.mark.parametrize("name", ["run", "hf"])
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_parameters_are_loaded_into_the_shards_of_a_mesh(root, name, weights):
    mesh = serving_mesh(data=2, tensor=2)
    model = ServedModel.load(root / name, weights=weights, mesh=mesh)
    assert model.mesh is mesh
    whole = ServedModel.load(root / name, weights=weights).params
    kernel = jax.tree.leaves(model.params["layers"]["mlp"]["up"]["kernel"])[0]
    assert [shard.data.shape for shard in kernel.addressable_shards] == [(1, 16, 12)] * 4
    jax.tree.map(np.testing.assert_array_equal, model.params, whole)


def test_a_model_that_does_not_fit_a_mesh_is_refused(root):
    with pytest.raises(UserError, match="tensor=4: 2 attention heads"):
        ServedModel.load(root / "run", mesh=serving_mesh(tensor=4))
