"""Logits against transformers itself, for every family and option; needs torch and transformers."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml.models import Transformer, module_of
from ml.models.huggingface import (
    canonical,
    load_config,
    load_params,
    parse_config,
    save_pretrained,
    write_config,
)

pytestmark = pytest.mark.parity

_SCRIPT = Path(__file__).parents[2] / "scripts" / "make_golden.py"
_spec = importlib.util.spec_from_file_location("make_golden", _SCRIPT)
make_golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_golden)
CASES = make_golden.CASES

TOLERANCE = 1e-4  # absolute, on logits whose standard deviation is asserted to exceed 1


def logits(folder, tokens):
    config = load_config(folder)
    params = load_params(folder, config)
    return np.asarray(jax.jit(lambda p, t: module_of(config).apply({"params": p}, t, method="forward"))(params, tokens))


@pytest.fixture(params=list(CASES))
def case(request):
    return CASES[request.param]


def test_logits_in_and_out(case, tmp_path, transformers):
    tokens = make_golden.tokens()
    model = make_golden.build(case)
    theirs = make_golden.logits(model, tokens)
    assert theirs.std() > 1.0
    model.save_pretrained(tmp_path / "in")
    assert np.abs(logits(tmp_path / "in", tokens) - theirs).max() <= TOLERANCE

    config = load_config(tmp_path / "in")
    save_pretrained(tmp_path / "out", config, load_params(tmp_path / "in", config))
    back, report = make_golden.auto_class(case.family).from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    # The same code on the same weights: anything but rounding is a setting lost on the way.
    assert np.abs(make_golden.logits(back, tokens) - theirs).max() <= 1e-6


def test_settings_in_the_spelling_of_transformers_4(case, tmp_path, transformers):
    """`rope_theta` and `rope_scaling` at the top, `torch_dtype`: the files that most published models have."""
    make_golden.build(case).config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    new = load_config(tmp_path)
    rope = values.pop("rope_parameters", None)
    values["torch_dtype"] = values.pop("dtype", "float32")
    if case.family == "gemma3_text":
        values["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if rope is not None:
        values["rope_theta"] = rope.pop("rope_theta")
        values["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_config(tmp_path) == new


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_fused_experts(name, tmp_path, transformers):
    """transformers 5 may store all experts of a layer as one tensor, gate and up fused."""
    tokens = make_golden.tokens()
    model = make_golden.build(CASES[name])
    model.save_pretrained(tmp_path, save_original_format=False)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert "model.layers.0.mlp.experts.gate_up_proj" in file.keys()  # noqa: SIM118
    assert np.abs(logits(tmp_path, tokens) - make_golden.logits(model, tokens)).max() <= TOLERANCE


def test_sharded_bfloat16(tmp_path, transformers):
    tokens = make_golden.tokens()
    model = make_golden.build(CASES["llama"])
    make_golden.round_to_bfloat16(model)
    theirs = make_golden.logits(model, tokens)
    model.bfloat16().save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("model-*.safetensors"))) > 2
    config = load_config(tmp_path / "in")
    params = load_params(tmp_path / "in", config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    save_pretrained(tmp_path / "out", config, params, max_shard_size="20KB", dtype="float32")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert np.abs(make_golden.logits(back, tokens) - theirs).max() <= 1e-6
    assert np.abs(logits(tmp_path / "out", tokens) - theirs).max() <= TOLERANCE


def test_generated_text(tmp_path, transformers):
    """Greedy continuation of a prompt, text to text, through an exported folder with its tokenizer."""
    import tokenizers
    import torch

    text = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=96, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    model = make_golden.build(CASES["llama"])
    model.save_pretrained(tmp_path / "in")
    config = load_config(tmp_path / "in")
    params = load_params(tmp_path / "in", config)
    save_pretrained(tmp_path / "out", config, params, tmp_path / "tokenizer.json")

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.eos_token == "<|endoftext|>"
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert exported.config.eos_token_id == theirs.eos_token_id == tokenizer.token_to_id("<|endoftext|>")
    prompt = theirs("the lazy fox", return_tensors="pt")["input_ids"]
    assert prompt[0].tolist() == tokenizer.encode("the lazy fox").ids
    exported.generation_config.eos_token_id = None  # let neither stop early
    with torch.no_grad():
        wanted = exported.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)[0].tolist()

    apply = jax.jit(lambda t: Transformer(config).apply({"params": params}, t, method="forward"))
    ids = prompt[0].tolist()
    while len(ids) < len(wanted):
        padded = np.zeros((1, len(wanted)), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(apply(padded)[0, len(ids) - 1].argmax()))
    assert tokenizer.decode(ids) == theirs.decode(wanted, skip_special_tokens=True)
    assert len(set(wanted[prompt.shape[1] :])) > 3, "a text that repeats one token proves little"


def test_every_setting_survives_the_round_trip(case, tmp_path, transformers):
    make_golden.build(case).config.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    assert canonical(parse_config(write_config(config)[1])[1]) == canonical(config)
