"""Rotary settings of ``config.json``: ``rope_theta`` + ``rope_scaling`` (transformers 4), ``rope_parameters`` (5)."""

import math
from collections.abc import Mapping
from typing import Any

from ml.errors import UserError
from ml.models.config import RopeConfig, TransformerConfig

_SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
_KEYS = {
    "none": set(),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"}
    | {"mscale", "mscale_all_dim", "truncate"},
}
_KINDS = ("full_attention", "sliding_attention")


def read_rope(
    values: Mapping[str, Any], source: str, max_length: int, default_theta: float, per_kind: bool
) -> tuple[RopeConfig, float | None]:
    """Reads the rotary settings of a parsed ``config.json``.

    Args:
      values: the file.
      source: its path, for messages.
      max_length: stands for a missing ``original_max_position_embeddings``.
      default_theta: stands for a missing ``rope_theta``.
      per_kind: Gemma 3: full and sliding layers have their own.

    Returns:
      The settings of (full-attention) layers, and, with ``per_kind``, the base of sliding layers.

    Raises:
      UserError: a rotary type or key that cannot be represented (named).
    """
    theta = values.get("rope_theta")
    # transformers 5 lets the older field win where a file has both.
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    group = values.get(name) or {}
    if not isinstance(group, Mapping):
        raise UserError(f"{source}: {name} is {group!r}; expected an object")
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(f"{source}: partial_rotary_factor is {values['partial_rotary_factor']}; only 1 is supported")
    if not per_kind:
        if any(kind in group for kind in _KINDS):
            raise UserError(f"{source}: {name} differs by layer type, which only gemma3_text supports")
        return _read_group(group, f"{source}: {name}", max_length, default_theta if theta is None else theta), None

    local_theta = values.get("rope_local_base_freq", 10_000.0)
    nested = any(kind in group for kind in _KINDS)
    full = (group.get("full_attention") or {}) if nested else group
    sliding = (group.get("sliding_attention") or {}) if nested else {}
    rope = _read_group(full, f"{source}: {name}", max_length, default_theta if theta is None else theta)
    local = _read_group(sliding, f"{source}: {name}.sliding_attention", max_length, local_theta)
    if local.scaling != "none":
        raise UserError(
            f"{source}: {name}.sliding_attention.rope_type is {local.scaling!r}; only 'default' is supported"
        )
    return rope, local.theta


def _read_group(group: Mapping[str, Any], place: str, max_length: int, theta: float) -> RopeConfig:
    kind = group.get("rope_type", group.get("type", "default"))
    if kind not in _SCALINGS:
        raise UserError(f"{place}.rope_type is {kind!r}; supported: {', '.join(_SCALINGS)}")
    scaling = _SCALINGS[kind]
    if group.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(f"{place}.partial_rotary_factor is {group['partial_rotary_factor']}; only 1 is supported")
    bookkeeping = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
    for key in sorted(set(group) - bookkeeping - _KEYS[scaling]):
        # A null or another scaling's leftover of the original length changes nothing.
        if group[key] is not None and key != "original_max_position_embeddings":
            raise UserError(f"{place}.{key} is not a field of rope_type {kind!r}; if it changes nothing, remove it")

    def number(key: str, default: float | None = None) -> float:
        value = group.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            problem = "is missing" if value is None else f"is {value!r}; expected a positive number"
            raise UserError(f"{place}.{key} {problem}")
        return float(value)

    theta = number("rope_theta", theta)
    if scaling == "none":
        return RopeConfig(theta=theta)
    if scaling == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=number("factor"))
    original = int(number("original_max_position_embeddings", max_length))
    if scaling == "llama3":
        return RopeConfig(
            theta=theta,
            scaling="llama3",
            factor=number("factor"),
            original_length=original,
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
        )
    factor = number("factor", max_length / original)
    attention_factor = group.get("attention_factor")
    if attention_factor is None and group.get("mscale") and group.get("mscale_all_dim"):
        attention_factor = _mscale(factor, number("mscale")) / _mscale(factor, number("mscale_all_dim"))
    return RopeConfig(
        theta=theta,
        scaling="yarn",
        factor=factor,
        original_length=original,
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        attention_factor=None if attention_factor is None else float(attention_factor),
        truncate=bool(group.get("truncate", True)),
    )


def write_rope(config: TransformerConfig, per_kind: bool) -> dict[str, Any]:
    """Fields for ``config.json``, in both spellings; `read_rope` is the inverse."""
    rope = config.rope
    scaled: dict[str, Any] = {"rope_type": "default" if rope.scaling == "none" else rope.scaling}
    if rope.scaling != "none":
        scaled["factor"] = rope.factor
    if rope.scaling in ("llama3", "yarn"):
        scaled["original_max_position_embeddings"] = rope.original_length
    if rope.scaling == "llama3":
        scaled |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        scaled |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        if rope.attention_factor is not None:
            scaled["attention_factor"] = rope.attention_factor
    older = {"rope_theta": rope.theta, "rope_scaling": None if rope.scaling == "none" else dict(scaled)}
    full = scaled | {"rope_theta": rope.theta}
    if not per_kind:
        return older | {"rope_parameters": full}
    local = config.local_rope_theta
    if local is None:
        # Without a base of their own, sliding layers turn as the others do, which Gemma 3 can say only unscaled.
        if rope.scaling != "none" and any(config.is_local(layer) for layer in range(config.num_layers)):
            raise UserError("gemma3_text cannot scale the rotary embedding of sliding layers")
        local = rope.theta
    sliding = {"rope_type": "default", "rope_theta": local}
    return older | {
        "rope_local_base_freq": local,
        "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
    }


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
