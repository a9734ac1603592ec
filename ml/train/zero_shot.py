"""Zero-shot classification (Radford et al. 2021, section 3.1): a class is what its name, put into sentences, means."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ml.models.two_tower import TwoTower

TEMPLATES = (
    "a photo of a {}.",
    "a picture of the {}.",
    "a blurry photo of a {}.",
    "a close-up photo of a {}.",
    "a drawing of a {}.",
    "one {}.",
    "many {}.",
)
"""Sentences for a class, of which the mean embedding is taken; ``{}`` stands for its name."""

Encode = Callable[[Sequence[str]], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """How well images were classified.

    Attributes:
      images: how many.
      top1, top5: shares of them whose class is the nearest, or among the five nearest.
    """

    images: int
    top1: float
    top5: float


def class_embeddings(
    model: TwoTower, params: PyTree, encode: Encode, names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Float[Array, "classes features"]:
    """A unit vector for each class: the mean over templates of the unit vectors of its sentences, normed again.

    Args:
      model: the two towers.
      params: theirs.
      encode: texts -> ``tokens`` and ``segment_ids``, ``[texts, length]`` (`ml.data.captions.encode_captions`).
      names: of the classes.
      templates: each with one ``{}``.
    """
    embed: Any = jax.jit(lambda p, *text: model.apply({"params": p}, *text, method="embed_texts"))
    total = jnp.zeros((len(names), model.config.features))
    for template in templates:
        texts = encode([template.replace("{}", name) for name in names])
        total = total + embed(params, texts["tokens"], texts["segment_ids"])
    return total / jnp.linalg.norm(total, axis=1, keepdims=True)


def zero_shot(
    model: TwoTower,
    params: PyTree,
    classes: Float[Array, "classes features"],
    batches: Iterable[Mapping[str, np.ndarray]],
) -> ZeroShot:
    """Classifies images by the nearest class.

    Args:
      model, params: as in `class_embeddings`.
      classes: of `class_embeddings`.
      batches: each with ``images [rows, height, width, channels]``, ``targets [rows, 1]`` (numbers of classes) and
        ``loss_mask [rows, 1]``, 0 for rows that are none.
    """

    @jax.jit
    def hits(params: PyTree, images: jax.Array, targets: jax.Array, mask: jax.Array) -> Float[Array, "3"]:
        embedded: Any = model.apply({"params": params}, images, method="embed_images")
        similarities = embedded @ classes.T
        own = jnp.take_along_axis(similarities, targets, axis=1)
        closer = (similarities > own).sum(axis=1, keepdims=True)
        return jnp.stack([jnp.sum(x * mask) for x in (closer < 1, closer < 5, jnp.ones_like(closer))])

    total = np.zeros(3)
    for batch in batches:
        total += jax.device_get(hits(params, batch["images"], batch["targets"], batch["loss_mask"]))
    top1, top5, count = total.tolist()
    return ZeroShot(round(count), top1 / max(count, 1), top5 / max(count, 1))
