"""Writes the golden files of tests/models/golden: tiny random models made by transformers, and their logits."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

LENGTH = 40  # longer than every sliding window and every original context below

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GPT2: dict[str, Any] = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
_BERT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "pad_token_id": None,
}
_SIZES_OF = {"gpt2": _GPT2, "bert": _BERT}
_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 4}
_GEMMA = {"tie_word_embeddings": True, "query_pre_attn_scalar": 24, "sliding_window": 8}


def _rope(**fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1000.0, **fields}}


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny model: its family, the fields of its config, and whether its files are committed."""

    family: str
    fields: dict[str, Any]
    golden: bool = False


CASES = {
    "llama": Case("llama", {}),
    "llama_tied": Case("llama", {"tie_word_embeddings": True}),
    "llama_biases": Case("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama_linear": Case("llama", _rope(rope_type="linear", factor=2.5)),
    "llama_llama3": Case("llama", _rope(**_LLAMA3, original_max_position_embeddings=32), golden=True),
    "llama_yarn": Case("llama", _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16), golden=True),
    "llama_yarn_options": Case(
        "llama",
        _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=8.0, beta_slow=0.5)
        | {"head_dim": 32},
    ),
    "llama_yarn_untruncated": Case(
        "llama",
        _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, truncate=False, attention_factor=1.5),
    ),
    "llama_yarn_mscale": Case(
        "llama",
        _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.4, mscale_all_dim=0.7),
    ),
    "mistral": Case("mistral", {"sliding_window": 8}, golden=True),
    "mistral_full": Case("mistral", {"sliding_window": None}),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True}, golden=True),
    "qwen2_window": Case("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": Case("qwen3", {}, golden=True),
    "qwen3_biases": Case("qwen3", {"attention_bias": True}),
    "qwen3_window": Case(
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8}
        | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    ),
    "qwen3_yarn": Case("qwen3", _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)),
    "mixtral": Case("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, golden=True),
    "mixtral_window": Case("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 8}),
    "qwen3_moe": Case("qwen3_moe", _MOE | {"norm_topk_prob": True}, golden=True),
    "qwen3_moe_unnormalized": Case("qwen3_moe", _MOE | {"norm_topk_prob": False, "attention_bias": True}),
    "gemma": Case("gemma", {"tie_word_embeddings": True, "num_key_value_heads": 1}, golden=True),
    "gemma2": Case("gemma2", _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, golden=True),
    "gemma2_uncapped": Case("gemma2", _GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3_text": Case(
        "gemma3_text",
        _GEMMA
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 20_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            }
        },
        golden=True,
    ),
    "gemma3_text_softcap": Case("gemma3_text", _GEMMA | {"final_logit_softcapping": 3.0, "num_hidden_layers": 7}),
    "gpt2": Case("gpt2", {}, golden=True),
    "gpt2_unscaled": Case(
        "gpt2",
        {"scale_attn_weights": False, "n_inner": 40, "activation_function": "gelu", "tie_word_embeddings": False},
    ),
    "bert": Case("bert", {}, golden=True),
    "bert_options": Case("bert", {"type_vocab_size": 3, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
}


def build(case: Case, seed: int = 0) -> Any:
    """A `transformers` model in float32 with eager attention, all of whose weights matter to its logits."""
    import torch
    import transformers

    torch.manual_seed(seed)
    sizes = _SIZES_OF.get(case.family, _SIZES)
    config = transformers.AutoConfig.for_model(case.family, **(sizes | case.fields))
    model = auto_class(case.family).from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0.0, _stddev(name, tuple(weight.shape), case))
            if weight.ndim == 1 and name.endswith("weight") and not case.family.startswith("gemma"):
                weight.add_(1.0)  # a norm's scale; Gemma stores it less one
    return model.eval()


def auto_class(family: str) -> Any:
    """The class of `transformers` that makes and loads models of this family with the heads they are trained with."""
    import transformers

    return transformers.AutoModelForPreTraining if family == "bert" else transformers.AutoModelForCausalLM


def round_to_bfloat16(model: Any) -> None:
    """Makes every weight one that bfloat16 can hold, leaving its dtype (and the rotary frequencies) in float32."""
    import torch

    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits of the tokens by `transformers`, float32 ``[batch, length, vocab]``."""
    import torch

    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        if model.config.model_type == "bert":
            return model(ids).prediction_logits.numpy()
        return model(ids, use_cache=False).logits.numpy()


def tokens(batch: int = 2, vocab_size: int = 96) -> np.ndarray:
    """Token ids, int32 ``[batch, LENGTH]``."""
    return np.random.default_rng(1).integers(0, vocab_size, (batch, LENGTH), dtype=np.int32)


def _stddev(name: str, shape: tuple[int, ...], case: Case) -> float:
    """Logits come out with a deviation near one, attention neither uniform nor one-hot."""
    if len(shape) == 1:
        return 0.3
    if any(part in name for part in ("embed_tokens", "wte", "wpe", "_embeddings")):
        return 0.3 if case.fields.get("tie_word_embeddings", case.family in ("gpt2", "bert")) else 1.0
    fan_in = shape[0] if case.family == "gpt2" and "lm_head" not in name else shape[-1]
    return (2.0 if "lm_head" in name else 1.2) * fan_in**-0.5


def write_golden(name: str, case: Case, folder: Path) -> None:
    """Writes ``config.json``, ``model.safetensors`` (bfloat16) and ``logits.npy`` (computed in float32) of one case."""
    model = build(case)
    round_to_bfloat16(model)
    expected = logits(model, tokens(batch=1))
    model.bfloat16()
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        target = folder / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(Path(scratch) / file, target / file)
    np.save(target / "logits.npy", expected)


def main() -> None:
    """Writes every case that is marked golden."""
    import transformers

    folder = Path(flags.FLAGS.output)
    for name, case in CASES.items():
        if case.golden:
            write_golden(name, case, folder)
    made_by = {"transformers": transformers.__version__, "length": LENGTH}
    (folder / "made_by.json").write_text(json.dumps(made_by) + "\n")
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {total / 1e6:.2f} MB")


USAGE = """Makes the golden files that tests compare our logits with. Needs torch and transformers.

Example:
  python scripts/make_golden.py --output=tests/models/golden
"""

if __name__ == "__main__":
    from app import run

    flags.DEFINE_string("output", "tests/models/golden", "folder to write to")
    run(main, usage=USAGE)
