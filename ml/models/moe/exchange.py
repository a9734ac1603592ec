"""How tokens come to the devices that own their experts, and back: two exchanges with one result.

All of this runs on one device inside a `jax.shard_map`. Nothing is ever dropped, so the buffers of rows have the size
of the worst case, every token of the axis sent to one device: ``devices * tokens * min(top_k, experts per device)``
rows, which no static shape can undercut. Only the rows that exist are multiplied.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ml.errors import UserError
from ml.models.config import MoEConfig
from ml.models.moe.routing import count_choices

# (rows sorted by expert, rows of each of the device's experts) -> what the experts make of the rows
Experts = Callable[[Float[Array, "rows embed"], Int[Array, " owned"]], Float[Array, "rows embed"]]


class Slices(NamedTuple):
    """The arguments of one `jax.lax.ragged_all_to_all`, each ``[devices * owned]``, ordered by device, then expert."""

    input_offsets: Int[Array, " slices"]
    send_sizes: Int[Array, " slices"]
    output_offsets: Int[Array, " slices"]
    recv_sizes: Int[Array, " slices"]


class Plan(NamedTuple):
    """Where every row goes.

    Attributes:
      group_sizes: rows of each expert that this device owns.
      to_owner: from rows sorted by expert, at home, to rows sorted by expert, at the owner.
      to_home: the way back.
    """

    group_sizes: Int[Array, " owned"]
    to_owner: Slices
    to_home: Slices


def plan(counts: Int[Array, "devices experts"], device: Int[Array, ""]) -> Plan:
    """Plans the exchange for ``device`` from how many rows each device has for each expert.

    Device ``j`` owns experts ``j * owned`` to ``(j + 1) * owned - 1``. A slice is what one device sends to one expert,
    and it lands where the expert's rows lie in the owner's buffer, so that the owner need not sort.
    """
    devices, experts = counts.shape
    owned = experts // devices
    zero = jnp.zeros((devices, 1), counts.dtype)
    # At home rows are sorted by expert, so a slice starts after those of all experts before.
    home = jnp.concatenate([zero, jnp.cumsum(counts, axis=1)[:, :-1]], axis=1)  # [source, expert]
    # At the owner they are sorted by expert, then by the device that sent them.
    per_expert = counts.sum(axis=0).reshape(devices, owned)
    first = jnp.concatenate([zero, jnp.cumsum(per_expert, axis=1)[:, :-1]], axis=1).reshape(experts)
    before = jnp.cumsum(counts, axis=0) - counts
    owner = first + before  # [source, expert]

    def mine(of: jax.Array) -> jax.Array:
        """The columns of this device's experts, ordered by source, then expert."""
        return jax.lax.dynamic_slice_in_dim(of, device * owned, owned, axis=1).reshape(-1)

    sent, received = counts[device], mine(counts)
    return Plan(
        group_sizes=per_expert[device],
        to_owner=Slices(home[device], sent, owner[device], received),
        to_home=Slices(mine(owner), received, mine(home), sent),
    )


def buffer_rows(tokens: int, devices: int, experts: int, top_k: int) -> int:
    """Rows of a device's buffer, for ``tokens`` tokens on each device: the most that can ever be sent to it.

    The choices of a token are different experts, so a device that owns ``experts / devices`` of them gets a token no
    more often than that.
    """
    return devices * tokens * min(top_k, experts // devices)


def choose_exchange(moe: MoEConfig, devices: int, platform: str | None) -> str:
    """Resolves ``moe.exchange``.

    Each way, ``gather`` moves ``devices - 1`` rows per token and ``ragged`` ``top_k (devices - 1) / devices`` on
    average, so the former is cheaper up to ``devices = top_k``; XLA has no ragged exchange on CPU.

    Args:
      moe: the layer.
      devices: along the expert axis.
      platform: of the mesh (which may be compiled for where no such device is); ``None``: unknown.

    Raises:
      UserError: ``ragged`` on a CPU.
    """
    if moe.exchange == "ragged" and platform == "cpu":
        raise UserError("config.model.moe.exchange='ragged' does not exist on cpu; use 'auto' or 'gather'")
    if moe.exchange != "auto":
        return moe.exchange
    return "ragged" if platform in ("tpu", "cuda", "rocm", "gpu") and devices > moe.top_k else "gather"


def through_experts(
    tokens: Float[Array, "tokens embed"],
    top: Float[Array, "tokens k"],
    chosen: Int[Array, "tokens k"],
    experts: Experts,
    moe: MoEConfig,
    *,
    axis: str | None,
    platform: str | None,
) -> Float[Array, "tokens embed"]:
    """Sends every token through its experts and sums what they make of it, weighted by ``top``.

    Args:
      tokens: of this device.
      top: weight of each choice.
      chosen: the experts; distinct for each token.
      experts: those that this device owns.
      moe: how many experts there are, and how to exchange. ``ragged``: `jax.lax.ragged_all_to_all` brings each row to
        its expert's owner, and another one back. ``gather``: each device gathers the tokens of all, computes what its
        own experts contribute, and the sums are scattered back. The same rows are multiplied either way.
      axis: manual mesh axis over which the experts are spread, in order; ``None``: this device owns all.
      platform: see `choose_exchange`.
    """
    if axis is not None and choose_exchange(moe, jax.lax.axis_size(axis), platform) == "ragged":
        return _by_ragged_exchange(tokens, top, chosen, experts, moe.num_experts, axis)
    return _by_gathering(tokens, top, chosen, experts, moe.num_experts, axis)


def _by_gathering(tokens, top, chosen, experts, num_experts, axis):
    devices = 1 if axis is None else jax.lax.axis_size(axis)
    owned, first = num_experts // devices, 0
    if axis is not None:
        first = owned * jax.lax.axis_index(axis)
        tokens, top, chosen = (jax.lax.all_gather(x, axis, tiled=True) for x in (tokens, top, chosen))
    count, k = top.shape
    local = chosen.reshape(-1) - first
    local = jnp.where((local >= 0) & (local < owned), local, owned)  # others' experts come last
    sizes = count_choices(local[:, None], owned + 1)[:owned]
    rows = buffer_rows(count // devices, devices, num_experts, k)
    choice = jnp.argsort(local, stable=True)[:rows]
    # Beyond the rows that exist indices point outside: what is read there is 0, what is written is dropped.
    choice = jnp.where(jnp.arange(rows) < sizes.sum(), choice, count * k)
    token = choice // k
    out = experts(jnp.take(tokens, token, axis=0, mode="fill", fill_value=0), sizes)
    weight = jnp.take(top.reshape(-1), choice, mode="fill", fill_value=0)
    summed = _weighted_sum(out, weight, token, tokens)
    return summed if axis is None else jax.lax.psum_scatter(summed, axis, tiled=True)


def _by_ragged_exchange(tokens, top, chosen, experts, num_experts, axis):
    count, k = top.shape
    counts = jax.lax.all_gather(count_choices(chosen, num_experts), axis)
    where = plan(counts, jax.lax.axis_index(axis))
    choice = jnp.argsort(chosen.reshape(-1), stable=True)
    rows = buffer_rows(count, len(counts), num_experts, k)
    received = _exchange(axis, (count * k, rows), tokens[choice // k], where.to_owner, where.to_home)
    out = experts(received, where.group_sizes)
    returned = _exchange(axis, (rows, count * k), out, where.to_home, where.to_owner)
    return _weighted_sum(returned, top.reshape(-1)[choice], choice // k, tokens)


def _weighted_sum(rows, weight, token, like):
    """Adds each row, times its weight, to its token; in float32, as the terms are added one by one."""
    rows = rows * weight[:, None].astype(rows.dtype)
    summed = jnp.zeros_like(like, jnp.float32).at[token].add(rows.astype(jnp.float32), mode="drop")
    return summed.astype(like.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchange(axis: str, rows: tuple[int, int], x: jax.Array, there: Slices, back: Slices) -> jax.Array:
    """Sends slices of ``x`` and returns what was received, in a buffer that is 0 elsewhere.

    The gradient takes the way back, which JAX's own rule would have to work out with two more exchanges.

    Args:
      axis: the mesh axis.
      rows: of ``x``, and of the buffer.
      x: what is sent.
      there: slices of ``x`` and where they go.
      back: the opposite way.
    """
    buffer = jnp.zeros_like(x, shape=(rows[1], *x.shape[1:]))
    return jax.lax.ragged_all_to_all(x, buffer, *there, axis_name=axis)


def _exchange_forward(axis, rows, x, there, back):
    return _exchange(axis, rows, x, there, back), (there, back)


def _exchange_backward(axis, rows, saved, gradient):
    there, back = saved
    return _exchange(axis, rows[::-1], gradient, back, there), None, None


_exchange.defvjp(_exchange_forward, _exchange_backward)
