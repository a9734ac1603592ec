"""`TransformerConfig` -> Hugging Face ``config.json``.

The family is the first whose file, read back, gives the same architecture: what cannot be expressed is found by that
round trip, not by a list that could be incomplete.
"""

import dataclasses
import math
from typing import Any

from ml.errors import UserError
from ml.models.config import MoEConfig, RopeConfig, TransformerConfig
from ml.models.huggingface.clip_config import write_clip
from ml.models.huggingface.families import ACTIVATION_NAMES, ARCHITECTURES
from ml.models.huggingface.names import Config
from ml.models.huggingface.read_config import parse_config, shortest_pattern
from ml.models.huggingface.rope import write_rope
from ml.models.two_tower_config import TwoTowerConfig


def write_config(config: Config) -> tuple[str, dict[str, Any]]:
    """Chooses the family that expresses ``config`` exactly.

    The fields are such that transformers 4 and 5 both read them.

    Returns:
      The family (``model_type``) and the contents of ``config.json``.

    Raises:
      UserError: no family can; names the options in the way.
    """
    if isinstance(config, TwoTowerConfig):
        return _write_two_tower(config)
    if config.moe is not None and config.moe.bias_update_rate:
        raise UserError(
            f"moe.bias_update_rate={config.moe.bias_update_rate}: no supported Hugging Face architecture has a router "
            "bias; keep this model in megabatch's own format, or train one with moe.bias_update_rate=0"
        )
    if config.encoder is not None and config.encoder.pooling != "first":
        raise UserError(
            f"encoder.pooling={config.encoder.pooling}: a Hugging Face BERT classifies by its first token; keep this "
            "model in megabatch's own format, or fine-tune one with encoder.pooling=first"
        )
    wanted = canonical(config)
    closest: tuple[str, list[str]] | None = None
    for family in (name for name in ARCHITECTURES if name != "clip"):
        try:
            special = {"gpt2": _write_gpt2, "bert": _write_bert}.get(family)
            values = _write_llama_like(family, config) if special is None else special(config)
            back = parse_config(values)[1]
        except UserError:
            continue  # the family lacks a value that this architecture needs
        assert isinstance(back, TransformerConfig)
        differing = _differing(config, wanted, canonical(back))
        if not differing:
            return family, values
        if closest is None or len(differing) < len(closest[1]):
            closest = family, differing
    assert closest is not None  # mistral's writer accepts everything
    family, differing = closest
    raise UserError(
        f"no Hugging Face architecture expresses this one: {family}, the closest, cannot have {', '.join(differing)}"
    )


def _write_two_tower(config: TwoTowerConfig) -> tuple[str, dict[str, Any]]:
    values = write_clip(config)
    try:
        back: Any = parse_config(values)[1]
    except UserError as error:
        raise UserError(f"no Hugging Face architecture expresses this one: {error}") from None
    pixels = {name: getattr(config.image, name) for name in ("pixel_mean", "pixel_std")}  # in a file of their own
    differing = [
        *(
            f"image.{field}"
            for field in _differing(config.image, config.image, dataclasses.replace(back.image, **pixels))
        ),
        *(f"text.{field}" for field in _differing(config.text, canonical(config.text), canonical(back.text))),
        *([] if _same(config.temperature, back.temperature) else [f"temperature={config.temperature}"]),
    ]
    if differing:
        raise UserError(f"no Hugging Face architecture expresses this one: clip cannot have {', '.join(differing)}")
    return "clip", values


def _differing(config: Any, wanted: Any, back: Any) -> list[str]:
    """The fields of ``config``, or of the same in another form, that did not come back."""
    return [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if not _same(getattr(wanted, field.name), getattr(back, field.name))
    ]


def canonical(config: TransformerConfig) -> TransformerConfig:
    """The same architecture with every setting that has no effect at its default: equal models compare equal."""
    default = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
    changes: dict[str, Any] = {}
    local = [config.is_local(layer) for layer in range(config.num_layers)]
    changes["window_pattern"] = shortest_pattern(local) if any(local) else ()
    if not any(local):
        changes["sliding_window"] = None
    if config.position_embedding != "rope":
        changes |= {"rope": default["rope"], "local_rope_theta": None}
    else:
        used = {"none": ("theta",), "linear": ("theta", "factor")}.get(config.rope.scaling)
        used = used or ("theta", "factor", "original_length") + (
            ("low_freq_factor", "high_freq_factor")
            if config.rope.scaling == "llama3"
            else ("beta_fast", "beta_slow", "attention_factor", "truncate")
        )
        changes["rope"] = RopeConfig(scaling=config.rope.scaling, **{name: getattr(config.rope, name) for name in used})
        alone = RopeConfig(theta=config.local_rope_theta) if config.local_rope_theta is not None else None
        if alone == changes["rope"] or not any(local):
            changes["local_rope_theta"] = None
    if config.attention_scale is not None and math.isclose(config.attention_scale, config.head_dim**-0.5, rel_tol=1e-6):
        changes["attention_scale"] = None
    if config.moe is not None:
        changes |= {"mlp_dim": config.moe.mlp_dim, "gated_mlp": True, "mlp_bias": False}
        default_moe = MoEConfig(1, 1, 1)
        how_it_trains = {name: getattr(default_moe, name) for name in ("balance_over", "exchange")}
        changes["moe"] = dataclasses.replace(config.moe, **how_it_trains)
    return dataclasses.replace(config, **changes)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b


def _write_gpt2(config: TransformerConfig) -> dict[str, Any]:
    return _header("gpt2", config) | {
        "n_embd": config.embed_dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_length,
        "n_inner": config.mlp_dim,
        "activation_function": ACTIVATION_NAMES.get(config.activation, config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.attention_scale is None,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _write_bert(config: TransformerConfig) -> dict[str, Any]:
    if config.encoder is None:
        raise UserError("bert is an encoder")
    classes = config.encoder.num_classes
    values = _header("bert", config) | {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_length,
        "type_vocab_size": config.encoder.token_types,
        "hidden_act": ACTIVATION_NAMES.get(config.activation, config.activation),
        "layer_norm_eps": config.norm_eps,
        "position_embedding_type": "absolute",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if classes:
        values["architectures"] = ["BertForSequenceClassification"]
        values["id2label"] = {str(label): f"LABEL_{label}" for label in range(classes)}
        values["label2id"] = {f"LABEL_{label}": label for label in range(classes)}
    return values


def _write_llama_like(family: str, config: TransformerConfig) -> dict[str, Any]:
    divided = ("llama", "gemma2", "gemma3_text")  # transformers 5 insists, though head_dim is given
    if family in divided and config.embed_dim % config.num_heads:
        raise UserError(f"{family} needs hidden_size to be a multiple of num_attention_heads")
    names = ACTIVATION_NAMES | {"gelu_tanh": "gelu_pytorch_tanh"}
    activation = names.get(config.activation, config.activation)
    values = _header(family, config) | {
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
        "hidden_activation" if family in ("gemma2", "gemma3_text") else "hidden_act": activation,
    }
    if family not in ("mistral", "mixtral", "qwen2"):
        values["attention_bias"] = config.out_bias
    if family == "llama":
        values["mlp_bias"] = config.mlp_bias
    local = [config.is_local(layer) for layer in range(config.num_layers)]
    values |= write_rope(config, per_kind=family == "gemma3_text")
    values |= _write_window(family, config, local)
    if family in ("gemma2", "gemma3_text"):
        scalar = config.head_dim if config.attention_scale is None else config.attention_scale**-2
        values["query_pre_attn_scalar"] = round(scalar)
        values["attn_logit_softcapping"] = config.attention_softcap
        values["final_logit_softcapping"] = config.final_softcap
    if family in ("mixtral", "qwen3_moe"):
        values |= _write_moe(family, config)
    return values


def _write_window(family: str, config: TransformerConfig, local: list[bool]) -> dict[str, Any]:
    if family in ("llama", "gemma"):
        return {}
    if family in ("mistral", "mixtral"):
        return {"sliding_window": config.sliding_window if any(local) else None}
    kinds = ["sliding_attention" if kind else "full_attention" for kind in local]
    if family.startswith("qwen"):
        values: dict[str, Any] = {"use_sliding_window": any(local), "sliding_window": config.sliding_window}
        # transformers 4 before layer_types knew only "the last layers slide".
        values["max_window_layers"] = local.index(True) if any(local) else config.num_layers
        return values if family == "qwen3_moe" else values | {"layer_types": kinds}
    return {"sliding_window": config.sliding_window, "layer_types": kinds}


def _write_moe(family: str, config: TransformerConfig) -> dict[str, Any]:
    if config.moe is None:
        raise UserError(f"{family} needs experts")
    values = {
        "num_experts_per_tok": config.moe.top_k,
        "router_aux_loss_coef": config.moe.aux_loss_weight,
        "output_router_logits": False,
    }
    if family == "mixtral":
        return values | {"num_local_experts": config.moe.num_experts, "intermediate_size": config.moe.mlp_dim}
    return values | {
        "num_experts": config.moe.num_experts,
        "moe_intermediate_size": config.moe.mlp_dim,
        "norm_topk_prob": config.moe.normalize_top_k,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _header(family: str, config: TransformerConfig) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_stddev,
        "use_cache": True,
    }
