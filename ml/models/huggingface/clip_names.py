"""Where each tensor of a Hugging Face CLIP lives in the parameter tree of `ml.models.two_tower.TwoTower`."""

import dataclasses

import numpy as np

from ml.models.huggingface.tensor import Part, Tensor, part
from ml.models.two_tower_config import TwoTowerConfig

_Shapes = dict[str, tuple[int, ...]]

_OUTER = {
    "image/first_token/embedding": "vision_model.embeddings.class_embedding",
    "image/patches/kernel": "vision_model.embeddings.patch_embedding.weight",
    "image/position/embedding": "vision_model.embeddings.position_embedding.weight",
    "image/pre_norm": "vision_model.pre_layrnorm",  # as it is spelled there
    "image/encoder/final_norm": "vision_model.post_layernorm",
    "text/embed/embedding": "text_model.embeddings.token_embedding.weight",
    "text/position/embedding": "text_model.embeddings.position_embedding.weight",
    "text/final_norm": "text_model.final_layer_norm",
    "image_projection/kernel": "visual_projection.weight",
    "text_projection/kernel": "text_projection.weight",
    "logit/scale": "logit_scale",
}
_LAYER = {
    "attention_norm": "layer_norm1",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}


@dataclasses.dataclass(frozen=True)
class _Convolution(Part):
    """The kernel of a convolution, stored as ``[out, channels, height, width]``; the leaf has ``out`` last."""

    def view(self, indexed: np.ndarray) -> np.ndarray:
        """The leaf seen in the stored shape."""
        out, *inputs = self.shape
        return np.moveaxis(indexed.reshape(*inputs, out), -1, 0)


def leaf_shapes(config: TwoTowerConfig, image: _Shapes, text: _Shapes) -> _Shapes:
    """Path -> shape of every leaf of the parameter tree.

    Args:
      config: the architecture.
      image, text: those of the towers' transformers.
    """
    vit = config.image
    encoder = {path: shape for path, shape in image.items() if path.startswith(("layers/", "final_norm/"))}
    patches: _Shapes = {"kernel": (vit.channels * vit.patch_size**2, vit.embed_dim)}
    patches |= {"bias": (vit.embed_dim,)} if vit.patch_bias else {}
    norm: _Shapes = {"scale": (vit.embed_dim,), "bias": (vit.embed_dim,)} if vit.pre_norm else {}
    return {
        **{f"image/patches/{leaf}": shape for leaf, shape in patches.items()},
        "image/first_token/embedding": (1, vit.embed_dim),
        "image/position/embedding": (vit.tokens, vit.embed_dim),
        **{f"image/pre_norm/{leaf}": shape for leaf, shape in norm.items()},
        **{f"image/encoder/{path}": shape for path, shape in encoder.items()},
        **{f"text/{path}": shape for path, shape in text.items()},
        "image_projection/kernel": (vit.embed_dim, config.features),
        "text_projection/kernel": (config.text.embed_dim, config.features),
        "logit/scale": (),
    }


def tensors(config: TwoTowerConfig, shapes: _Shapes) -> list[Tensor]:
    """The checkpoint's tensors, grouped by the leaf they fill.

    Args:
      config: the architecture.
      shapes: of `leaf_shapes`.
    """
    result = []
    for path, shape in shapes.items():
        tower, found, below = path.partition("/layers/")
        if not found:
            result.append(Tensor(_outer_name(path), (_outer_part(config, path, shape),)))
            continue
        model = "text_model" if tower == "text" else "vision_model"
        module, _, leaf = below.rpartition("/")
        inputs = 0 if leaf != "kernel" else 2 if module == "attention/out" else 1
        for layer in range(shape[0]):
            name = f"{model}.encoder.layers.{layer}.{_LAYER[module]}.{'bias' if leaf == 'bias' else 'weight'}"
            result.append(Tensor(name, (part(path, (layer,), shape[1:], inputs, leaf == "kernel"),)))
    return result


def _outer_name(path: str) -> str:
    if path in _OUTER:
        return _OUTER[path]
    module, _, leaf = path.rpartition("/")
    # A bias of patches has no name in CLIP; `write_config` refuses it before.
    return f"{_OUTER.get(module, module)}.{'bias' if leaf == 'bias' else 'weight'}"


def _outer_part(config: TwoTowerConfig, path: str, shape: tuple[int, ...]) -> Part:
    image = config.image
    if path == "image/patches/kernel":
        return _Convolution(path, (), (image.embed_dim, image.channels, image.patch_size, image.patch_size), False)
    if path == "image/first_token/embedding":
        return Part(path, (), shape[1:], False)
    if path.endswith("embedding") or len(shape) < 2:
        return Part(path, (), shape, False)
    return part(path, (), shape, 1, True)
