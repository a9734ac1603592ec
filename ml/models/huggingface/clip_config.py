"""The ``config.json`` of a CLIP <-> `TwoTowerConfig`: a part for each tower, and what lies above both."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ml.errors import UserError
from ml.models.huggingface.families import ACTIVATION_NAMES
from ml.models.huggingface.fields import Fields, activation
from ml.models.two_tower_config import TwoTowerConfig, ViTConfig, text_tower

# As an end token: the text ends at its largest id. So transformers reads the first files of CLIP, whose end token is
# the last of the vocabulary.
_LARGEST_ID = 2
_PROCESSOR = "preprocessor_config.json"
_OF_LAYERS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def read_clip(fields: Fields) -> TwoTowerConfig:
    """The architecture that a CLIP's ``config.json`` describes.

    Raises:
      UserError: a field cannot be represented, or is not known (named).
    """
    text, image = _tower(fields, "text"), _tower(fields, "vision")
    fields.read |= {"initializer_factor", "tie_word_embeddings"}
    for tower in (text, image):  # of the tower without its partner
        tower.read |= {"projection_dim", "initializer_factor", "tie_word_embeddings"}
    config = TwoTowerConfig(
        image=ViTConfig(
            image_size=_side(image, "image_size"),
            patch_size=_side(image, "patch_size"),
            channels=image("num_channels", int),
            norm_eps=image("layer_norm_eps", float),
            activation=activation(image, "hidden_act"),
            patch_bias=False,
            pre_norm=True,
            init_stddev=image("initializer_range", float, 0.02, positive=False),
            **_layers(image),
        ),
        text=text_tower(
            vocab_size=text("vocab_size", int),
            max_length=text("max_position_embeddings", int),
            norm_eps=text("layer_norm_eps", float),
            activation=activation(text, "hidden_act"),
            init_stddev=text("initializer_range", float, 0.02, positive=False),
            **_layers(text),
        ),
        features=fields("projection_dim", int),
        temperature=math.exp(-fields("logit_scale_init_value", float, positive=False)),
    )
    text.finish()
    image.finish()
    return config


def write_clip(config: TwoTowerConfig) -> dict[str, Any]:
    """The ``config.json`` of a two-tower model, as far as CLIP can be one; reading it back shows how far."""
    image, text = config.image, config.text
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.features,
        "logit_scale_init_value": -math.log(config.temperature),
        "text_config": _written("clip_text_model", text)
        | {"vocab_size": text.vocab_size, "max_position_embeddings": text.max_length, "eos_token_id": _LARGEST_ID}
        | {"bos_token_id": None, "pad_token_id": None, "projection_dim": config.features},
        "vision_config": _written("clip_vision_model", image)
        | {"image_size": image.image_size, "patch_size": image.patch_size, "num_channels": image.channels}
        | {"projection_dim": config.features},
    }


def add_end_token(values: dict[str, Any], ids: dict[str, int | None]) -> None:
    """Puts a tokenizer's special ids where transformers' CLIP looks for them: it reads a text at its end token.

    Raises:
      UserError: the tokenizer has no end token, or one that transformers would take for "the largest id".
    """
    if ids["eos_token_id"] in (None, _LARGEST_ID):
        raise UserError(
            f"the tokenizer's end-of-text id is {ids['eos_token_id']}, where transformers' CLIP finds no text's end; "
            "give the tokenizer that the model was trained with"
        )
    values["text_config"] |= ids


def read_pixels(folder: Path, config: TwoTowerConfig) -> TwoTowerConfig:
    """``config`` with the mean and deviation of pixels that the folder's image processor is set to, if it has one.

    Raises:
      UserError: the file is malformed.
    """
    path = folder / _PROCESSOR
    if not path.exists():
        return config
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        mean, std = (tuple(map(float, values[name])) for name in ("image_mean", "image_std"))
        image = dataclasses.replace(config.image, pixel_mean=mean, pixel_std=std)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as an image processor's settings: {error!r}") from None
    return dataclasses.replace(config, image=image)


def write_pixels(folder: Path, config: TwoTowerConfig) -> None:
    """Writes what transformers' image processor must know: size, mean and deviation of pixels."""
    image = config.image
    mean, std = (list(x) * (image.channels if len(x) == 1 else 1) for x in (image.pixel_mean, image.pixel_std))
    side = image.image_size
    values = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "image_mean": mean,
        "image_std": std,
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True),
    }
    (folder / _PROCESSOR).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _tower(fields: Fields, name: str) -> Fields:
    # Older files repeat what differs from the defaults in a second group, which wins.
    values = fields(f"{name}_config", dict, {}) | (fields(f"{name}_config_dict", dict, None, null=True) or {})
    tower = Fields(values, f"{fields.source}: {name}_config", f"clip_{name}_model")
    tower.refuse_if("is_decoder")
    return tower


def _layers(tower: Fields) -> dict[str, Any]:
    embed, mlp, layers, heads = (tower(name, int) for name in _OF_LAYERS)
    if embed % heads:
        raise tower.error("hidden_size", f"is {embed}, not a multiple of num_attention_heads ({heads})")
    return {"embed_dim": embed, "mlp_dim": mlp, "num_layers": layers, "num_heads": heads}


def _side(tower: Fields, name: str) -> int:
    value = tower.values.get(name)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        tower.read.add(name)
        return int(value[0])
    return tower(name, int)


def _written(kind: str, tower: Any) -> dict[str, Any]:
    sizes = (tower.embed_dim, tower.mlp_dim, tower.num_layers, tower.num_heads)
    return {"model_type": kind, **dict(zip(_OF_LAYERS, sizes, strict=True))} | {
        "hidden_act": ACTIVATION_NAMES.get(tower.activation, tower.activation),
        "layer_norm_eps": tower.norm_eps,
        "initializer_range": tower.init_stddev,
        "attention_dropout": 0.0,
    }
