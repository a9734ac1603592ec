"""Where each tensor of a Hugging Face checkpoint lives in the parameter tree: one table, read by import and export.

Their tensors are per layer (and per expert), matrices mostly ``[out, in]``; ours are stacked over layers and shaped for
einsum. Every entry of the table is therefore a *view*: slice a stacked leaf, reshape, perhaps transpose, and the result
has their tensor's shape without a copy. Rotary halves are paired alike, so nothing is permuted.
"""

from collections.abc import Iterable

from ml.models.config import TransformerConfig
from ml.models.huggingface import bert_names, clip_names
from ml.models.huggingface.tensor import Part, Tensor, part
from ml.models.two_tower_config import TwoTowerConfig

Config = TransformerConfig | TwoTowerConfig

# Leaf (below `layers/`) -> tensor (below `model.layers.N.`) in the Llama lineage.
_LLAMA_NAMES = {
    "attention_norm/scale": "input_layernorm.weight",
    "attention/query/kernel": "self_attn.q_proj.weight",
    "attention/key/kernel": "self_attn.k_proj.weight",
    "attention/value/kernel": "self_attn.v_proj.weight",
    "attention/out/kernel": "self_attn.o_proj.weight",
    "attention/query/bias": "self_attn.q_proj.bias",
    "attention/key/bias": "self_attn.k_proj.bias",
    "attention/value/bias": "self_attn.v_proj.bias",
    "attention/out/bias": "self_attn.o_proj.bias",
    "attention/query_norm/scale": "self_attn.q_norm.weight",
    "attention/key_norm/scale": "self_attn.k_norm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/gate/kernel": "mlp.gate_proj.weight",
    "mlp/up/kernel": "mlp.up_proj.weight",
    "mlp/down/kernel": "mlp.down_proj.weight",
    "mlp/gate/bias": "mlp.gate_proj.bias",
    "mlp/up/bias": "mlp.up_proj.bias",
    "mlp/down/bias": "mlp.down_proj.bias",
}
# Gemma 2 and 3 give the second norm's old name to the norm *after* attention.
_POST_NORM_NAMES = _LLAMA_NAMES | {
    "post_attention_norm/scale": "post_attention_layernorm.weight",
    "mlp_norm/scale": "pre_feedforward_layernorm.weight",
    "post_mlp_norm/scale": "post_feedforward_layernorm.weight",
}
_GPT2_NAMES = {
    "attention_norm/scale": "ln_1.weight",
    "attention_norm/bias": "ln_1.bias",
    "attention/out/kernel": "attn.c_proj.weight",
    "attention/out/bias": "attn.c_proj.bias",
    "mlp_norm/scale": "ln_2.weight",
    "mlp_norm/bias": "ln_2.bias",
    "mlp/up/kernel": "mlp.c_fc.weight",
    "mlp/up/bias": "mlp.c_fc.bias",
    "mlp/down/kernel": "mlp.c_proj.weight",
    "mlp/down/bias": "mlp.c_proj.bias",
}
# Family -> (block of experts below a layer, gate, up and down projection of one expert).
_EXPERT_NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def leaf_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every leaf of the parameter tree that the Hugging Face families can fill."""
    if isinstance(config, TwoTowerConfig):
        return clip_names.leaf_shapes(config, leaf_shapes(config.image.blocks), leaf_shapes(config.text))
    if config.encoder is not None:
        return bert_names.leaf_shapes(config)
    embed, heads, kv_heads, head_dim = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed/embedding": (config.vocab_size, embed)}
    if config.position_embedding == "learned":
        shapes["position/embedding"] = (config.max_length, embed)

    layer: dict[str, tuple[int, ...]] = {}
    norms = ["attention_norm", "mlp_norm"] + (["post_attention_norm", "post_mlp_norm"] if config.post_norms else [])
    for norm in norms:
        layer[f"{norm}/scale"] = (embed,)
        if config.norm == "layer":
            layer[f"{norm}/bias"] = (embed,)
    for name, count in (("query", heads), ("key", kv_heads), ("value", kv_heads)):
        layer[f"attention/{name}/kernel"] = (embed, count, head_dim)
        if config.qkv_bias:
            layer[f"attention/{name}/bias"] = (count, head_dim)
    layer["attention/out/kernel"] = (heads, head_dim, embed)
    if config.out_bias:
        layer["attention/out/bias"] = (embed,)
    if config.qk_norm:
        layer["attention/query_norm/scale"] = layer["attention/key_norm/scale"] = (head_dim,)
    inputs = ("gate", "up") if config.gated_mlp or config.moe is not None else ("up",)
    if config.moe is not None:
        experts, hidden = config.moe.num_experts, config.moe.mlp_dim
        layer["moe/router/kernel"] = (embed, experts)
        layer |= {f"moe/{name}/kernel": (experts, embed, hidden) for name in inputs}
        layer["moe/down/kernel"] = (experts, hidden, embed)
    else:
        layer |= {f"mlp/{name}/kernel": (embed, config.mlp_dim) for name in inputs}
        layer["mlp/down/kernel"] = (config.mlp_dim, embed)
        if config.mlp_bias:
            layer |= {f"mlp/{name}/bias": (config.mlp_dim,) for name in inputs}
            layer["mlp/down/bias"] = (embed,)
    shapes |= {f"layers/{path}": (config.num_layers, *shape) for path, shape in layer.items()}

    shapes["final_norm/scale"] = (embed,)
    if config.norm == "layer":
        shapes["final_norm/bias"] = (embed,)
    if not config.tie_embeddings:
        shapes["unembed/kernel"] = (embed, config.vocab_size)
    return shapes


def tensors(config: Config, family: str, present: Iterable[str] = ()) -> list[Tensor]:
    """The checkpoint's tensors, grouped by the leaf they fill.

    Args:
      config: the architecture.
      family: Hugging Face ``model_type``.
      present: names found in a checkpoint being read. They decide between equivalent spellings: with or without the
        ``model.`` prefix, one tensor per expert or all experts in one. Empty: the spelling that is written.
    """
    present = set(present)
    if isinstance(config, TwoTowerConfig):
        return clip_names.tensors(config, leaf_shapes(config))
    if config.encoder is not None:
        return bert_names.tensors(config, present)
    prefix, blocks = ("transformer.", "h") if family == "gpt2" else ("model.", "layers")
    if present and not any(name.startswith(prefix) for name in present):
        prefix = ""
    shapes = leaf_shapes(config)
    result = []
    for path, shape in shapes.items():
        if path.startswith("layers/"):
            for layer in range(config.num_layers):
                result += _layer_tensors(config, family, path, shape[1:], layer, f"{prefix}{blocks}.{layer}.", present)
        else:
            name = _outer_name(family, path, prefix)
            result.append(Tensor(name, (part(path, (), shape, inputs=1, transposed=path == "unembed/kernel"),)))
    return result


def ignored(name: str, config: Config) -> bool:
    """Whether a tensor of the checkpoint is a buffer that older versions of transformers saved, not a weight."""
    if isinstance(config, TwoTowerConfig) or config.encoder is not None:
        return name.endswith("embeddings.position_ids")
    if config.position_embedding == "rope":
        return name.endswith(".rotary_emb.inv_freq")
    return name.endswith((".attn.bias", ".attn.masked_bias"))


def repeated(config: Config, table: list[Tensor]) -> dict[str, str]:
    """Tensors that a checkpoint with tied embeddings may hold a second time, by the name of the first."""
    if isinstance(config, TwoTowerConfig):
        return {}
    if config.encoder is not None:
        return bert_names.repeated(table)
    return {"lm_head.weight": table[0].name} if config.tie_embeddings else {}


def _outer_name(family: str, path: str, prefix: str) -> str:
    llama = {"embed/embedding": "embed_tokens.weight", "final_norm/scale": "norm.weight"}
    gpt2 = {
        "embed/embedding": "wte.weight",
        "position/embedding": "wpe.weight",
        "final_norm/scale": "ln_f.weight",
        "final_norm/bias": "ln_f.bias",
    }
    return "lm_head.weight" if path == "unembed/kernel" else prefix + (gpt2 if family == "gpt2" else llama)[path]


def _layer_tensors(
    config: TransformerConfig,
    family: str,
    path: str,
    shape: tuple[int, ...],
    layer: int,
    prefix: str,
    present: set[str],
) -> list[Tensor]:
    """The tensors of one layer whose first part is the leaf ``path``; ``shape`` is the leaf's, without layers."""
    local = path.removeprefix("layers/")
    inputs = 2 if local == "attention/out/kernel" else 1
    if local.startswith("moe/"):
        return _expert_tensors(family, path, shape, layer, prefix, present)
    if family == "gpt2":
        if local.startswith(("attention/key", "attention/value")):
            return []  # fused into the query's
        if local.startswith("attention/query"):
            leaf = local.rpartition("/")[2]
            paths = [f"layers/attention/{name}/{leaf}" for name in ("query", "key", "value")]
            fused = tuple(part(other, (layer,), shape, inputs if leaf == "kernel" else 0) for other in paths)
            return [Tensor(f"{prefix}attn.c_attn.{'weight' if leaf == 'kernel' else 'bias'}", fused)]
        return [Tensor(prefix + _GPT2_NAMES[local], (part(path, (layer,), shape, inputs),))]
    names = _POST_NORM_NAMES if config.post_norms else _LLAMA_NAMES
    is_matrix = local.endswith("/kernel")
    return [Tensor(prefix + names[local], (part(path, (layer,), shape, inputs if is_matrix else 0, is_matrix),))]


def _expert_tensors(
    family: str, path: str, shape: tuple[int, ...], layer: int, prefix: str, present: set[str]
) -> list[Tensor]:
    block, gate, up, down = _EXPERT_NAMES[family]
    if f"{prefix}mlp.gate.weight" in present:
        block = "mlp"  # transformers 5's own spelling of Mixtral
    role = path.split("/")[2]
    if role == "router":
        return [Tensor(f"{prefix}{block}.gate.weight", (part(path, (layer,), shape, 1, True),))]
    experts, rows, columns = shape
    if f"{prefix}{block}.experts.gate_up_proj" in present:
        stored = (experts, columns, rows)
        if role == "up":
            return []  # fused behind the gate
        if role == "down":
            return [Tensor(f"{prefix}{block}.experts.down_proj", (Part(path, (layer,), stored, True),))]
        both = (path, path.replace("/gate/", "/up/"))
        return [Tensor(f"{prefix}{block}.experts.gate_up_proj", tuple(Part(p, (layer,), stored, True) for p in both))]
    name = {"gate": gate, "up": up, "down": down}[role]
    return [
        Tensor(f"{prefix}{block}.experts.{expert}.{name}.weight", (part(path, (layer, expert), shape[1:], 1, True),))
        for expert in range(experts)
    ]
