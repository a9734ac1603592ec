"""Where each tensor of a Hugging Face BERT lives in the parameter tree, in the layout of ``BertForPreTraining``."""

from ml.models.config import TransformerConfig
from ml.models.huggingface.tensor import Part, Tensor, part

_EMBEDDINGS = {
    "embed/embedding": "word_embeddings.weight",
    "position/embedding": "position_embeddings.weight",
    "token_type/embedding": "token_type_embeddings.weight",
    "embedding_norm/scale": "LayerNorm.weight",
    "embedding_norm/bias": "LayerNorm.bias",
}
_LAYER = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
# Outside of `bert.`.
_HEADS = {
    "mlm_dense/kernel": "cls.predictions.transform.dense.weight",
    "mlm_dense/bias": "cls.predictions.transform.dense.bias",
    "mlm_norm/scale": "cls.predictions.transform.LayerNorm.weight",
    "mlm_norm/bias": "cls.predictions.transform.LayerNorm.bias",
    "mlm_output/bias": "cls.predictions.bias",
    "next_sentence/kernel": "cls.seq_relationship.weight",
    "next_sentence/bias": "cls.seq_relationship.bias",
    "classifier/kernel": "classifier.weight",
    "classifier/bias": "classifier.bias",
}
_SECOND_NAMES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


def leaf_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every leaf of `ml.models.bert.Bert`'s parameter tree."""
    assert config.encoder is not None
    embed, heads, head_dim, hidden = config.embed_dim, config.num_heads, config.head_dim, config.mlp_dim
    norm: dict[str, tuple[int, ...]] = {"scale": (embed,), "bias": (embed,)}
    layer: dict[str, tuple[int, ...]] = {}
    for name in ("query", "key", "value"):
        layer[f"attention/{name}/kernel"] = (embed, heads, head_dim)
        layer[f"attention/{name}/bias"] = (heads, head_dim)
    layer |= {"attention/out/kernel": (heads, head_dim, embed), "attention/out/bias": (embed,)}
    layer |= {"mlp/up/kernel": (embed, hidden), "mlp/up/bias": (hidden,)}
    layer |= {"mlp/down/kernel": (hidden, embed), "mlp/down/bias": (embed,)}
    layer |= {f"{name}/{leaf}": shape for name in ("attention_norm", "mlp_norm") for leaf, shape in norm.items()}

    shapes = {
        "embed/embedding": (config.vocab_size, embed),
        "position/embedding": (config.max_length, embed),
        "token_type/embedding": (config.encoder.token_types, embed),
        **{f"embedding_norm/{leaf}": shape for leaf, shape in norm.items()},
        **{f"layers/{path}": (config.num_layers, *shape) for path, shape in layer.items()},
    }
    if config.encoder.pooling == "first":
        shapes |= {"pooler/kernel": (embed, embed), "pooler/bias": (embed,)}
    classes = config.encoder.num_classes
    if classes:
        return shapes | {"classifier/kernel": (embed, classes), "classifier/bias": (classes,)}
    shapes |= {"mlm_dense/kernel": (embed, embed), "mlm_dense/bias": (embed,), "mlm_output/bias": (config.vocab_size,)}
    shapes |= {f"mlm_norm/{leaf}": shape for leaf, shape in norm.items()}
    return shapes | {"next_sentence/kernel": (embed, 2), "next_sentence/bias": (2,)}


def tensors(config: TransformerConfig, present: set[str]) -> list[Tensor]:
    """The checkpoint's tensors, grouped by the leaf they fill.

    Args:
      config: the architecture.
      present: names found in a checkpoint being read: files converted from TensorFlow have ``gamma`` and ``beta`` for a
        norm's weight and bias.
    """
    result = []
    for path, shape in leaf_shapes(config).items():
        if path.startswith("layers/"):
            module, _, leaf = path.removeprefix("layers/").rpartition("/")
            for layer in range(config.num_layers):
                name = f"bert.encoder.layer.{layer}.{_LAYER[module]}.{'bias' if leaf == 'bias' else 'weight'}"
                inputs = 2 if module == "attention/out" else 1
                result.append(_tensor(name, path, (layer,), shape[1:], inputs, present))
        else:
            name = _HEADS.get(path) or f"bert.{_outer(path)}"
            result.append(_tensor(name, path, (), shape, 1, present))
    return result


def repeated(table: list[Tensor]) -> dict[str, str]:
    """Tensors of the tied decoder that a checkpoint may hold a second time, by the name of the first."""
    names = {tensor.name for tensor in table}
    return {second: first for second, first in _SECOND_NAMES.items() if "cls.predictions.bias" in names}


def _outer(path: str) -> str:
    if path.startswith("pooler/"):
        return f"pooler.dense.{'weight' if path.endswith('kernel') else 'bias'}"
    return f"embeddings.{_EMBEDDINGS[path]}"


def _tensor(
    name: str, path: str, index: tuple[int, ...], shape: tuple[int, ...], inputs: int, present: set[str]
) -> Tensor:
    old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    view: Part = part(path, index, shape, inputs if path.endswith("/kernel") else 0, path.endswith("/kernel"))
    if path.endswith("embedding"):
        view = Part(path, index, shape, False)
    return Tensor(old if old in present else name, (view,))
