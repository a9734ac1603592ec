"""Attention for training and prefill: exact, memory linear in the sequence length."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.fallback import choose
from pallas_kernels.flash_attention import cudnn, reference, splash
from pallas_kernels.flash_attention.backend import Backend
from pallas_kernels.flash_attention.intervals import Band, Intervals, segment_intervals, self_intervals, static_band
from pallas_kernels.flash_attention.vjp import Call, attend
from pallas_kernels.platform import platform
from pallas_kernels.sharded import on_shards

Implementation = Literal["auto", "xla", "cpu", "gpu", "tpu", "cudnn", "splash", "reference"]

# What `auto` tries on each platform before XLA, from the most to the least wanted.
# cuDNN stands before our own kernel until that has been measured to be the faster one on an H200.
_WANTED = {"cpu": ("cpu",), "gpu": ("cudnn", "gpu"), "tpu": ("splash", "tpu")}
# Kernels of others, for self-attention alone: they return no log-sum-exp and take no intervals.
_PEERS = {"cudnn": cudnn, "splash": splash}
_OWN = ("xla", "cpu", "gpu", "tpu")
# Opaque to the partitioner, so each device is given its own part.
_OPAQUE = ("cpu", "gpu", "tpu")


def flash_attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    *,
    segment_ids: Int[Array, "batch queries"] | None = None,
    causal: bool = True,
    window: int | Int[Array, ""] | None = None,
    intervals: Intervals | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    implementation: Implementation = "auto",
    config: Any = None,
) -> Any:
    """Grouped-query attention, ``softmax(scale * q k^T) v`` over the keys that a query may see.

    It is causal self-attention unless said otherwise: a query at index ``i`` sees keys
    ``max(0, i - window + 1) .. i`` of its own segment.

    Args:
      query: heads ``g * n .. g * n + n - 1`` share key/value head ``g``, with ``n = heads / kv_heads``.
      key: keys; as many as queries unless ``intervals`` are given.
      value: values.
      segment_ids: packed documents, each a run of equal ids; a token sees only its own. ``None``: one segment.
      causal: ``False`` (an encoder): a query sees all keys of its own segment.
      window: sliding window in tokens, itself included; may be traced.
      intervals: query ``i`` sees keys ``intervals[b, i, 0] <= j < intervals[b, i, 1]``, none if that is empty; a batch
        of 1 holds for all rows. A NumPy array is static, and work that it hides is left out of the program.
      scale: multiplier on logits; ``None``: ``head_dim ** -0.5``.
      softcap: ``softcap * tanh(logit / softcap)`` before the mask.
      return_lse: also return the log-sum-exp, by which results over disjoint sets of keys merge
        (`pallas_kernels.log_sum_exp.merge`).
      implementation: ``xla`` (blocked, any platform), ``cpu`` (C++), ``gpu`` and ``tpu`` (Pallas), ``cudnn`` (NVIDIA,
        16-bit types), ``splash`` (JAX's kernels for TPUs), ``reference`` (float32, quadratic memory), or ``auto``: a
        kernel of the platform that the program is for (`pallas_kernels.platform`) if it supports the case, else XLA.
      config: the tuning of the implementation that is named, its dataclass; ``None``: its own choice.

    Returns:
      ``[batch, queries, heads, head_dim]`` in the query's type; with ``return_lse`` also the natural logarithm of each
      row's sum of exponentiated logits, float32 ``[batch, queries, heads]``. A row that sees nothing has output 0 and
      logarithm -inf. Both have derivatives.

    Raises:
      ValueError: unknown implementation, a case that it does not support, or arguments that do not fit together.
    """
    _check(query, key, value, segment_ids, causal, window, intervals)
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation={implementation!r}; choose {', '.join(get_args(Implementation))}")
    if config is not None and implementation in ("auto", "reference", *_PEERS):
        raise ValueError(f"config={config!r} with implementation={implementation!r}; name the one that it tunes")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    given = intervals is not None
    if intervals is None and causal:
        intervals = self_intervals(query.shape[1], window, segment_ids)
    elif intervals is None:
        intervals = segment_intervals(query.shape[1], segment_ids)

    def peer_why_not(name: str) -> str | None:
        if given or return_lse:
            return f"{'intervals' if given else 'return_lse'} cannot be given to a kernel that is not ours"
        return _PEERS[name].why_not(query, window, softcap)

    peers = {name: functools.partial(peer_why_not, name) for name in _PEERS}
    if implementation == "reference":
        out, lse = reference.flash_attention(query, key, value, intervals, scale=scale, softcap=softcap)
        return (out, lse) if return_lse else out
    name = _chosen(implementation, query, key, value, softcap, config, peers)
    if name in _PEERS:
        function = functools.partial(
            _PEERS[name].flash_attention, causal=causal, window=window, scale=scale, softcap=softcap
        )
        operands = (query, key, value, segment_ids)
        return on_shards(lambda q, k, v, segments: function(q, k, v, segment_ids=segments), operands, query)
    band = None
    if name == "xla":
        band = static_band(intervals) if not isinstance(intervals, jax.Array) else None
        if band is None and not given:
            band = _self_band(query.shape[1], window, causal)
    call = Call(backend(name), scale, softcap, config, name in _OPAQUE, band)
    out, lse = attend(call, query, key, value, jnp.asarray(intervals))
    return (out, lse) if return_lse else out


def backend(name: str) -> Backend:
    """The module of an implementation of ours; imported when it is first wanted, since its compiler may be absent."""
    return importlib.import_module(f"pallas_kernels.flash_attention.{name}")  # type: ignore[return-value]


def own_backend(implementation: str, query: Any, key: Any, value: Any, *, softcap: float | None) -> str:
    """The name of the `backend` that ``implementation`` is, or that ``auto`` takes, for those who call it themselves.

    Raises:
      ValueError: it is not one of ours, or does not support the case.
    """
    if implementation not in ("auto", *_OWN):
        raise ValueError(f"implementation={implementation!r}; choose auto, {', '.join(_OWN)}")
    return _chosen(implementation, query, key, value, softcap, None, {})


def _chosen(
    implementation: str,
    query: Any,
    key: Any,
    value: Any,
    softcap: float | None,
    config: Any,
    peers: Mapping[str, Callable[[], str | None]],
) -> str:
    def why_not(name: str) -> str | None:
        return backend(name).why_not(query, key, value, softcap=softcap, config=config)

    reasons = {name: functools.partial(why_not, name) for name in _OWN} | dict(peers)
    if implementation == "auto":
        wanted = [x for x in _WANTED.get(platform(), ()) if x in peers or (x in _OWN and _built(x))]
        return choose("flash_attention", {name: reasons[name] for name in (*wanted, "xla")})
    if (reason := reasons[implementation]()) is not None:
        raise ValueError(f"implementation={implementation!r} does not support this: {reason}")
    return implementation


@functools.cache
def _built(name: str) -> bool:
    return importlib.util.find_spec(f"pallas_kernels.flash_attention.{name}") is not None


def _self_band(length: int, window: Any, causal: bool) -> Band:
    """What is known of self-attention's intervals whatever the segments are."""
    if not causal:
        return Band(length - 1, length - 1)
    return static_band(self_intervals(length, window if isinstance(window, int) else None))


def _check(query: Any, key: Any, value: Any, segment_ids: Any, causal: bool, window: Any, intervals: Any) -> None:
    batch, queries, heads, head_dim = query.shape
    if key.shape != value.shape or key.shape[::3] != (batch, head_dim) or heads % max(key.shape[2], 1):
        raise ValueError(f"shapes do not fit: query {query.shape}, key {key.shape}, value {value.shape}")
    if intervals is None:
        if key.shape[1] != queries:
            raise ValueError(f"shapes do not fit: query {query.shape}, key {key.shape}; give intervals")
        if segment_ids is not None and segment_ids.shape != (batch, queries):
            raise ValueError(f"segment_ids has shape {segment_ids.shape}; it must be {(batch, queries)}")
        if not causal and window is not None:
            raise ValueError(f"window={window} with causal=False; a window looks back")
    else:
        if segment_ids is not None or window is not None:
            raise ValueError(f"{'window' if segment_ids is None else 'segment_ids'} cannot be given beside intervals")
        if intervals.shape not in ((batch, queries, 2), (1, queries, 2)):
            raise ValueError(f"intervals has shape {intervals.shape}; it must be {(batch, queries, 2)} or a batch of 1")


__all__ = ["Backend", "Implementation", "backend", "flash_attention", "own_backend"]
