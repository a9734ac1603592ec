"""`config.json` in and out: what published models say is read, what cannot be represented is refused by name."""

import dataclasses
import json

import pytest

from ml.errors import UserError
from ml.models import MoEConfig, RopeConfig, TransformerConfig
from ml.models.huggingface import canonical, load_config, parse_config, write_config

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
PLAIN = TransformerConfig(
    vocab_size=128, num_layers=4, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=96, max_length=256
)
MOE = MoEConfig(num_experts=4, top_k=2, mlp_dim=48)


def parse(**changes):
    return parse_config(LLAMA | changes)[1]


def test_llama_3_1_as_published():
    """The fields of meta-llama/Llama-3.1-8B's file, in transformers 4 spelling."""
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    family, config = parse_config(
        LLAMA
        | {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001}
        | {"hidden_act": "silu", "initializer_range": 0.02, "mlp_bias": False, "pretraining_tp": 1}
        | {"rope_scaling": scaling, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True}
        | {"transformers_version": "4.43.0.dev0"}
    )
    assert family == "llama"
    assert config == TransformerConfig(
        vocab_size=128,
        num_layers=4,
        embed_dim=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=96,
        max_length=131072,
        norm_eps=1e-5,
        rope=RopeConfig(500000.0, "llama3", 8.0, 8192, 1.0, 4.0),
    )


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_scaling": None}, RopeConfig(500000.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeConfig(500000.0, "linear", 2.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 7.0}}, RopeConfig(7.0, "linear", 2.0)),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            RopeConfig(500000.0, "yarn", 4.0, 32768),
        ),
        (  # without a factor: the ratio of the lengths
            {"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32768}},
            RopeConfig(500000.0, "yarn", 4.0, 32768),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False, "attention_factor": 1.25}},
            RopeConfig(500000.0, "yarn", 4.0, 131072, attention_factor=1.25, truncate=False),
        ),
    ],
)
def test_rope_spellings(rope, expected):
    assert parse(**rope).rope == expected


COMMON = {"attention_bias": False, "attention_dropout": 0.0, "use_cache": True, "transformers_version": "4.50.0.dev0"}
# What the published files of these models hold beside sizes, in the spelling of transformers 4.
PUBLISHED = {
    "Qwen/Qwen3-30B-A3B": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    | {"decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "max_window_layers": 48, "mlp_only_layers": []}
    | {"moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8}
    | {"output_router_logits": False, "rope_scaling": None, "router_aux_loss_coef": 0.001, "sliding_window": None}
    | {"tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False},
    "google/gemma-2-2b": {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    | {"attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "final_logit_softcapping": 30.0}
    | {"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    | {"query_pre_attn_scalar": 256, "sliding_window": 4096, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
    "google/gemma-3-1b-pt": {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    | {"attn_logit_softcapping": None, "cache_implementation": "hybrid", "final_logit_softcapping": None}
    | {"eos_token_id": [1, 106], "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "rope_scaling": None}
    | {"query_pre_attn_scalar": 256, "rope_local_base_freq": 10000, "sliding_window": 512, "sliding_window_pattern": 6},
    "HuggingFaceTB/SmolLM2-135M": {"is_llama_config": True, "rope_interleaved": False, "rope_scaling": None}
    | {"pretraining_tp": 1, "mlp_bias": False, "tie_word_embeddings": True, "initializer_range": 0.041666666666666664},
    "mistralai/Mixtral-8x7B-v0.1": {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    | {"num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False, "sliding_window": None}
    | {"router_aux_loss_coef": 0.02, "hidden_act": "silu", "tie_word_embeddings": False},
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_files_are_read(name):
    config = parse_config(LLAMA | COMMON | PUBLISHED[name])[1]
    if "gemma" in name:
        assert (config.sliding_window, config.attention_scale) == (PUBLISHED[name]["sliding_window"], None)
    if "Qwen3" in name:
        assert config.moe == MoEConfig(128, 8, 768, True, 0.001) and config.qk_norm and config.head_dim == 128


def test_gpt2_as_published():
    config = parse_config(
        {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1}
        | {"bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02}
        | {"layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12}
        | {"n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "vocab_size": 50257}
        | {"summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True}
        | {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}
    )[1]
    assert (config.mlp_dim, config.head_dim, config.max_length) == (3072, 64, 1024)
    assert (config.activation, config.norm, config.tie_embeddings) == ("gelu_tanh", "layer", True)


def test_defaults_of_fields_left_out():
    values = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "rope_theta")}
    config = parse_config(values)[1]
    assert (config.num_kv_heads, config.rope.theta, config.tie_embeddings) == (4, 10_000.0, False)
    gemma = parse_config(LLAMA | {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]})[1]
    assert (gemma.head_dim, gemma.tie_embeddings, gemma.activation) == (256, True, "gelu_tanh")


@pytest.mark.parametrize(
    ("changes", "window", "pattern"),
    [
        ({"use_sliding_window": False, "sliding_window": 8}, None, ()),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}, None, ()),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, 8, ()),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
            8,
            ("global", "global", "global", "local"),
        ),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
            | {"layer_types": ["full_attention", "sliding_attention"] * 2},
            8,
            ("global", "local"),
        ),
    ],
)
def test_qwen2_windows(changes, window, pattern):
    config = parse(model_type="qwen2", architectures=["Qwen2ForCausalLM"], **changes)
    assert (config.sliding_window, config.window_pattern) == (window, pattern)


def test_gemma3_window_period():
    config = parse(
        model_type="gemma3_text",
        architectures=None,
        sliding_window=8,
        sliding_window_pattern=3,
        num_hidden_layers=6,
        rope_local_base_freq=100.0,
    )
    assert config.window_pattern == ("local", "local", "global")
    assert (config.local_rope_theta, config.rope.theta) == (100.0, 500000.0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "falcon"}, "model_type 'falcon' is not a supported architecture (llama, mistral"),
        ({"model_type": None}, "model_type None is not a supported architecture"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; supported: silu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type is 'dynamic'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type is 'longrope'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is missing"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 2}}, "rope_parameters.beta_fast"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters differs by layer type"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"use_alibi": True}, "use_alibi is not a field that llama is known to have"),
        ({"sliding_window": 8}, "sliding_window is not a field that llama"),
        ({"hidden_size": "64"}, "hidden_size is '64'; expected int"),
        ({"hidden_size": None}, "hidden_size is null"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected a positive number"),
        ({"hidden_size": 66}, "hidden_size is 66, not a multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 5.0}, "attn_logit_softcapping"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"] * 3}, "layer_types must name"),
        ({"model_type": "qwen3", "layer_types": ["linear_attention"] * 4}, "layer_types must name"),
        ({"model_type": "gpt2", "n_embd": 64, "n_head": 4, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by"),
    ],
)
def test_refusals_name_the_field(changes, named, tmp_path):
    values = LLAMA | changes
    if "model_type" in changes:
        values["architectures"] = None
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as raised:
        load_config(tmp_path)
    assert named in str(raised.value)
    assert str(raised.value).startswith(f"{tmp_path}/config.json")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
def test_missing_field(name):
    values = {key: value for key, value in LLAMA.items() if key != name}
    with pytest.raises(UserError, match=f"config.json: {name} is missing"):
        parse_config(values)


def test_malformed_file(tmp_path):
    with pytest.raises(UserError, match=r"config.json: no such file"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama",\n nonsense}')
    with pytest.raises(UserError, match=r"config.json:2: malformed JSON"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"qkv_bias": True, "out_bias": True, "mlp_bias": True}, "llama"),
        ({"embed_dim": 60, "num_heads": 8}, "mistral"),  # transformers' Llama insists on divisible widths
        ({"sliding_window": 8}, "mistral"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qkv_bias": True, "sliding_window": 8, "window_pattern": ("global", "local")}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        ({"qk_norm": True, "sliding_window": 8, "window_pattern": ("local", "global", "global")}, "qwen3"),
        ({"moe": MOE}, "mixtral"),
        ({"moe": MOE, "qk_norm": True}, "qwen3_moe"),
        ({"norm_offset": True, "scale_embedding": True, "activation": "gelu_tanh"}, "gemma"),
        (
            {"norm_offset": True, "scale_embedding": True, "post_norms": True, "attention_softcap": 50.0}
            | {"attention_scale": 24**-0.5, "sliding_window": 8, "window_pattern": ("local", "global")},
            "gemma2",
        ),
        (
            {"norm_offset": True, "scale_embedding": True, "post_norms": True, "qk_norm": True}
            | {"local_rope_theta": 100.0, "sliding_window": 8, "window_pattern": ("local", "local", "global")}
            | {"rope": RopeConfig(1e6, "linear", 8.0)},
            "gemma3_text",
        ),
        (
            {"norm": "layer", "position_embedding": "learned", "gated_mlp": False, "num_kv_heads": 4}
            | {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "activation": "gelu_tanh"},
            "gpt2",
        ),
        ({"rope": RopeConfig(1e5, "yarn", 4.0, 64, beta_fast=16.0, attention_factor=1.1, truncate=False)}, "llama"),
        ({"rope": RopeConfig(1e5, "llama3", 8.0, 64, 2.0, 8.0)}, "llama"),
        ({"tie_embeddings": True, "activation": "gelu", "norm_eps": 1e-6}, "llama"),
    ],
)
def test_export_chooses_the_family_and_loses_nothing(changes, family):
    config = dataclasses.replace(PLAIN, **changes)
    chosen, values = write_config(config)
    assert chosen == values["model_type"] == family
    assert canonical(parse_config(values)[1]) == canonical(config)
    if family != "gpt2":  # both spellings, and they agree without each other
        for left_out in ("rope_parameters", "rope_scaling"):
            partial = {key: value for key, value in values.items() if key != left_out}
            assert canonical(parse_config(partial)[1]) == canonical(config)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"parallel_block": True}, "parallel_block=True"),
        ({"final_softcap": 30.0}, "final_softcap=30.0"),
        ({"out_bias": True}, "llama, the closest, cannot have qkv_bias=False"),
        ({"qk_norm": True, "norm_offset": True}, "norm_offset=True"),
        ({"attention_scale": 0.3}, "attention_scale=0.3"),
        ({"moe": dataclasses.replace(MOE, normalize_top_k=False)}, "moe="),
        ({"gated_mlp": False}, "gated_mlp=False"),
        ({"sliding_window": 8, "window_pattern": ("local", "global")}, "window_pattern=('local', 'global')"),
    ],
)
def test_export_names_the_option_in_the_way(changes, named):
    with pytest.raises(UserError) as raised:
        write_config(dataclasses.replace(PLAIN, **changes))
    assert named in str(raised.value)


def test_a_router_bias_cannot_be_exported():
    moe = dataclasses.replace(MOE, bias_update_rate=0.001)
    with pytest.raises(UserError, match=r"moe.bias_update_rate=0.001: .* has a router bias"):
        write_config(dataclasses.replace(PLAIN, moe=moe))


def test_how_experts_were_trained_does_not_hinder_export():
    moe = dataclasses.replace(MOE, balance_over="batch", exchange="gather")
    assert write_config(dataclasses.replace(PLAIN, moe=moe)) == write_config(dataclasses.replace(PLAIN, moe=MOE))


def test_canonical_keeps_what_matters():
    """A canonical form that dropped a live setting would let an export lose it unnoticed."""
    for field, value in {"sliding_window": 8, "qk_norm": True, "rope": RopeConfig(1e5), "attention_scale": 0.3}.items():
        assert canonical(dataclasses.replace(PLAIN, **{field: value})) != canonical(PLAIN)
    yarn = dataclasses.replace(PLAIN, rope=RopeConfig(scaling="yarn", factor=2.0))
    assert canonical(dataclasses.replace(yarn, rope=dataclasses.replace(yarn.rope, beta_fast=8.0))) != canonical(yarn)
    unused = dataclasses.replace(PLAIN, rope=RopeConfig(beta_fast=8.0, factor=3.0))
    assert canonical(unused) == canonical(PLAIN)
