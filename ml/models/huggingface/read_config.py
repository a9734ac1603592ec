"""Hugging Face ``config.json`` -> `TransformerConfig`, for the families whose forward pass ours reproduces.

Every field is accounted for: it is translated, or known not to change the forward pass (`HARMLESS`), or at a value that
means "off"; anything else is an error, never ignored.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml.errors import UserError, nearest
from ml.models.bert import bert_config
from ml.models.config import EncoderConfig, MoEConfig, TransformerConfig
from ml.models.huggingface.clip_config import read_clip, read_pixels
from ml.models.huggingface.families import ARCHITECTURES, OTHER_ARCHITECTURES
from ml.models.huggingface.fields import Fields, activation
from ml.models.huggingface.rope import read_rope
from ml.models.two_tower_config import TwoTowerConfig


def load_config(folder: str | Path) -> Any:
    """Reads the ``config.json`` of a Hugging Face model folder.

    Raises:
      UserError: no or malformed file, unsupported architecture, or a field that cannot be represented (named).
    """
    config = parse_config(*read_json(folder))[1]
    return read_pixels(Path(folder), config) if isinstance(config, TwoTowerConfig) else config


def read_json(folder: str | Path) -> tuple[dict[str, Any], str]:
    """The ``config.json`` of a folder as a dict, and its path for messages."""
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a folder with config.json and model.safetensors") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values, str(path)


def parse_config(
    values: Mapping[str, Any], source: str = "config.json"
) -> tuple[str, TransformerConfig | TwoTowerConfig]:
    """Translates a parsed ``config.json``.

    Returns:
      The family (``model_type``) and the architecture.

    Raises:
      UserError: as `load_config`.
    """
    family = values.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        hint = nearest(str(family), ARCHITECTURES)
        raise UserError(
            f"{source}: model_type {family!r} is not a supported architecture ({', '.join(ARCHITECTURES)}); {hint}"
        )
    named = values.get("architectures") or []
    known = (ARCHITECTURES[family], *OTHER_ARCHITECTURES.get(family, ()))
    if named and not any(name in known or name.endswith("Model") for name in named):
        raise UserError(f"{source}: architectures is {named}; of {family} only {' and '.join(known)} is supported")
    fields = Fields(values, source, family)
    fields.refuse_if("quantization_config", why="means quantized weights; save the checkpoint in bfloat16 or float32")
    fields.refuse_if("is_encoder_decoder")
    fields.refuse_if("add_cross_attention")
    fields.refuse_if("auto_map", why="means custom code, which is never run; use a supported architecture's own files")
    try:
        config = READERS.get(family, read_llama_like)(fields)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    fields.finish()
    return family, config


def _read_gpt2(fields: Fields) -> TransformerConfig:
    fields.refuse_if("scale_attn_by_inverse_layer_idx")
    embed, heads = fields("n_embd", int), fields("n_head", int)
    if embed % heads:
        raise fields.error("n_embd", f"is {embed}, not a multiple of n_head ({heads})")
    scaled = fields("scale_attn_weights", bool, True)
    return TransformerConfig(
        vocab_size=fields("vocab_size", int),
        num_layers=fields("n_layer", int),
        embed_dim=embed,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=embed // heads,
        mlp_dim=fields("n_inner", int, None, null=True) or 4 * embed,
        max_length=fields("n_positions", int),
        activation=activation(fields, "activation_function"),  # type: ignore[arg-type]
        gated_mlp=False,
        norm="layer",
        norm_eps=fields("layer_norm_epsilon", float),
        position_embedding="learned",
        attention_scale=None if scaled else 1.0,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tie_embeddings=fields("tie_word_embeddings", bool),
        init_stddev=fields("initializer_range", float, 0.02, positive=False),
    )


def _read_bert(fields: Fields) -> TransformerConfig:
    fields.refuse_if("is_decoder")
    fields.refuse_if("position_embedding_type", lambda kind: kind != "absolute")
    fields.refuse_if("tie_word_embeddings", lambda tied: not tied, "an encoder here cannot have: its decoder is tied")
    embed, heads = fields("hidden_size", int), fields("num_attention_heads", int)
    if embed % heads:
        raise fields.error("hidden_size", f"is {embed}, not a multiple of num_attention_heads ({heads})")
    classes = 0
    if "BertForSequenceClassification" in (fields.values.get("architectures") or []):
        fields.refuse_if("problem_type", lambda kind: kind != "single_label_classification")
        classes = len(fields("id2label", dict, {})) or fields("num_labels", int, 2)
    return bert_config(
        vocab_size=fields("vocab_size", int),
        num_layers=fields("num_hidden_layers", int),
        embed_dim=embed,
        num_heads=heads,
        mlp_dim=fields("intermediate_size", int),
        max_length=fields("max_position_embeddings", int),
        activation=activation(fields, "hidden_act"),
        norm_eps=fields("layer_norm_eps", float),
        init_stddev=fields("initializer_range", float, 0.02, positive=False),
        encoder=EncoderConfig(token_types=fields("type_vocab_size", int), num_classes=classes),
    )


def read_llama_like(fields: Fields) -> TransformerConfig:
    """Reads what Llama's lineage calls things; a family that differs in a little calls this and replaces that."""
    family, gemma = fields.family, fields.family.startswith("gemma")
    embed, heads = fields("hidden_size", int), fields("num_attention_heads", int)
    layers, max_length = fields("num_hidden_layers", int), fields("max_position_embeddings", int)
    head_dim = fields("head_dim", int, null=True)
    if head_dim is None:
        if embed % heads:
            raise fields.error("hidden_size", f"is {embed}, not a multiple of num_attention_heads ({heads})")
        head_dim = embed // heads
    fields.read |= {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
    if family == "gemma3_text":
        fields.read.add("rope_local_base_freq")
    rope, local_theta = read_rope(
        fields.values, fields.source, max_length, fields.defaults["rope_theta"], per_kind=family == "gemma3_text"
    )
    window, pattern = _read_window(fields, layers)
    bias = fields("attention_bias", bool, False) if family not in ("mistral", "mixtral", "qwen2") else False
    options: dict[str, Any] = {}
    if gemma:
        fields.refuse_if("use_bidirectional_attention")
        options = {"norm_offset": True, "scale_embedding": True}
    if family in ("gemma2", "gemma3_text"):
        scalar = fields("query_pre_attn_scalar", float)
        options["post_norms"] = True
        options["attention_scale"] = None if scalar == head_dim else scalar**-0.5
        options["final_softcap"] = fields("final_logit_softcapping", float, None, null=True)
    if family == "gemma2":
        options["attention_softcap"] = fields("attn_logit_softcapping", float, None, null=True)
    if family == "gemma3_text":
        fields.refuse_if("attn_logit_softcapping", why="transformers' Gemma 3 does not apply; set it to null")
        options["local_rope_theta"] = local_theta
    if family in ("mixtral", "qwen3_moe"):
        options["moe"] = _read_moe(fields)
    act = "hidden_act"
    if gemma and family != "gemma":
        act = "hidden_activation"
        fields.read.add("hidden_act")  # published files have it too; transformers does not read it
    elif family == "gemma":
        same = fields.values.get("hidden_act", "gelu_pytorch_tanh")
        fields.refuse_if("hidden_activation", lambda value: value != same, f"contradicts hidden_act ({same!r})")
    return TransformerConfig(
        vocab_size=fields("vocab_size", int),
        num_layers=layers,
        embed_dim=embed,
        num_heads=heads,
        num_kv_heads=fields("num_key_value_heads", int, null=True) or heads,
        head_dim=head_dim,
        mlp_dim=fields("intermediate_size", int),
        max_length=max_length,
        activation=activation(fields, act),  # type: ignore[arg-type]
        norm_eps=fields("rms_norm_eps", float),
        rope=rope,
        sliding_window=window,
        window_pattern=pattern,
        qk_norm=family in ("qwen3", "qwen3_moe", "gemma3_text"),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=fields("mlp_bias", bool, False) if family == "llama" else False,
        tie_embeddings=fields("tie_word_embeddings", bool),
        init_stddev=fields("initializer_range", float, 0.02, positive=False),
        **options,
    )


def _read_moe(fields: Fields) -> MoEConfig:
    mixtral = fields.family == "mixtral"
    if not mixtral:
        fields.refuse_if("mlp_only_layers", why="would mix dense and expert layers; every layer must have experts")
        fields.refuse_if(
            "decoder_sparse_step", lambda value: value != 1, "would mix dense and expert layers; only 1 works"
        )
    # Either name means either family's number of experts in transformers 5.
    for name, other in (("num_local_experts", "num_experts"), ("num_experts", "num_local_experts")):
        if name in fields.values:
            count = fields(name, int)
            fields.refuse_if(other, count.__ne__, f"contradicts {name} ({count})")
            break
    else:
        count = 8 if mixtral else 128
    return MoEConfig(
        num_experts=count,
        top_k=fields("num_experts_per_tok", int),
        mlp_dim=fields("intermediate_size" if mixtral else "moe_intermediate_size", int),
        normalize_top_k=True if mixtral else fields("norm_topk_prob", bool, False),
        aux_loss_weight=fields("router_aux_loss_coef", float, 0.001, positive=False),
    )


def _read_window(fields: Fields, layers: int) -> tuple[int | None, tuple[str, ...]]:
    """Sliding window, and the pattern of layers that have it (empty: all of them)."""
    family = fields.family
    if not family.startswith(("mistral", "mixtral", "qwen", "gemma2", "gemma3")):
        return None, ()  # what such a file says of windows all the same, nobody reads, and it is refused
    if family in ("mistral", "mixtral"):
        window = fields("sliding_window", int, None, null=True)
        fields.refuse_if("layer_types", lambda kinds: len(set(kinds)) > 1, f"{family} layers cannot differ in")
        return window, ()
    if family.startswith("qwen"):
        window = fields("sliding_window", int, 4096, null=True)
        if not fields("use_sliding_window", bool, False):
            window = None
    else:
        window = fields("sliding_window", int, null=True)

    kinds = fields("layer_types", list, None, null=True) if family != "qwen3_moe" else None
    if kinds is None:
        if family == "qwen3_moe":
            local = [True] * layers
        elif family.startswith("qwen"):
            local = [layer >= fields("max_window_layers", int, positive=False) for layer in range(layers)]
        else:
            period = 2 if family == "gemma2" else fields("sliding_window_pattern", int)
            local = [(layer + 1) % period != 0 for layer in range(layers)]
    else:
        fields.read.add("sliding_window_pattern")
        if len(kinds) != layers or set(kinds) - {"sliding_attention", "full_attention"}:
            raise fields.error(
                "layer_types", f"must name sliding_attention or full_attention for each of {layers} layers"
            )
        local = [kind == "sliding_attention" for kind in kinds]
    if window is None or not any(local):
        return None, ()
    return window, shortest_pattern(local)


def shortest_pattern(local: list[bool]) -> tuple[str, ...]:
    """The shortest pattern that, repeated, marks these layers as local; empty where all are."""
    if all(local):
        return ()
    periods = range(1, len(local) + 1)
    period = next(p for p in periods if all(local[i] == local[i % p] for i in range(len(local))))
    return tuple("local" if kind else "global" for kind in local[:period])


# Families that are read in a way of their own; all others are `read_llama_like`.
READERS: dict[str, Callable[[Fields], Any]] = {"gpt2": _read_gpt2, "bert": _read_bert, "clip": read_clip}
