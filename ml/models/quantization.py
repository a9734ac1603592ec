"""Which parameters are kept as whole numbers of 8 bits, and along which axes each of their scales runs."""

from collections.abc import Callable
from typing import Any

import jax

from ml.models.build import logical_axes
from ml.models.config import TransformerConfig
from ml.models.parameters import matrix_axes
from ml.weights import quantize


def leaf_quantizer(config: TransformerConfig, *, donate: bool = False) -> Callable[[str, Any], Any]:
    """A function that says what a parameter becomes: `ml.weights.Int8`, or what it is.

    Kernels get one scale per layer, expert and output channel, the embedding one per row, which serves looking up as
    well as tied logits. Norm scales, biases, learned positions and the experts' router stay as they are: they are
    small, and a router's rounding would send tokens to other experts.

    Args:
      config: the architecture.
      donate: whether the float parameter is deleted once its whole numbers are there.

    Returns:
      A function of a path, such as ``layers/mlp/up/kernel``, and the parameter, which may be abstract.
    """
    axes = logical_axes(config)

    def quantized(path: str, leaf: Any) -> Any:
        names: Any = axes
        for scope in path.split("/"):
            names = names[scope]
        summed = _summed_axes(path, names)
        if summed is None:
            return leaf
        result = quantize(leaf, summed)
        if donate:
            jax.block_until_ready(result)
            leaf.delete()
        return result

    return quantized


def quantize_params(config: TransformerConfig, params: dict[str, Any], *, donate: bool = False) -> dict[str, Any]:
    """A model's parameters with 8-bit kernels and embedding; see `leaf_quantizer`.

    Args:
      config: the architecture.
      params: its float parameters.
      donate: whether each is deleted once its whole numbers are there. Small ones go first, so that the most memory
        in use is that of ``params`` and the whole numbers of one of its smallest kernels.
    """
    quantized = leaf_quantizer(config, donate=donate)
    leaves, structure = jax.tree.flatten_with_path(params)
    paths = ["/".join(key.key for key in keys) for keys, _ in leaves]
    results: list[Any] = [leaf for _, leaf in leaves]
    for index in sorted(range(len(results)), key=lambda i: results[i].size):
        results[index] = quantized(paths[index], results[index])
    return jax.tree.unflatten(structure, results)


def _summed_axes(path: str, names: tuple[str, ...]) -> tuple[int, ...] | None:
    """The axes that products with a parameter sum over; ``None``: it is not to be quantized."""
    if path == "embed/embedding":
        return (names.index("embed"),)
    if path.endswith("/kernel") and "expert_logits" not in names:
        return matrix_axes(names)[0]
    return None
