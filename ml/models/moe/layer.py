"""The mixture-of-experts MLP: dropless top-k routing, one grouped matmul per projection, experts spread over a mesh."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from ml.errors import UserError
from ml.models.config import TransformerConfig
from ml.models.layers import activation, residual_stddev
from ml.models.moe.balance import MoEStats, layer_stats
from ml.models.moe.exchange import through_experts
from ml.models.moe.routing import route
from ml.models.parameters import Placement, placed, unplaced, weight
from ml.weights import dot, materialize, ragged_dot
from ml.weights.shards import mesh_axes

_EXPERT_KERNELS = ("gate", "up", "down")


class MoE(nn.Module):
    """Routes every token to ``top_k`` experts and sums their outputs, weighted by the router's probabilities.

    On a mesh each device routes its own tokens. Along the mesh axis of ``expert`` each device holds a part of the
    experts and computes it for the tokens of the whole axis; along that of ``mlp`` (tensor parallelism) it holds a part
    of every expert's width. What else cuts an expert's kernel (FSDP) is gathered, and its gradient scattered.
    """

    config: TransformerConfig
    place: Placement = unplaced

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        valid: Bool[Array, "batch length"] | None = None,
        expert_counts: Int[Array, " experts"] | None = None,
    ) -> tuple[Float[Array, "batch length embed"], MoEStats]:
        """Returns the output and how the experts were used.

        Args:
          x: activations.
          valid: which tokens count in the experts' load and its loss; ``None``: all. The others are computed too.
          expert_counts: how often each expert was chosen earlier in this optimizer step; see `layer_stats`.
        """
        weights = self._weights()
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return _on_one_device(self.config, _Axes(), x, valid, expert_counts, weights)
        # Sorting and `ragged_dot` have no sharding rules: from here on each device works by itself. Axes that are
        # manual already, such as a pipeline's stages, stay as they are.
        rows = self.place("batch", "length", None) or PartitionSpec(None, None, None)
        cut = self.place("expert", "mlp") or PartitionSpec(None, None)
        axes = _Axes(
            tokens=mesh_axes(rows[0]) + mesh_axes(rows[1]),
            expert=mesh_axes(cut[0]),
            mlp=mesh_axes(cut[1]),
            platform=mesh.abstract_device.platform if mesh.abstract_device else None,
        )
        # A leaf may be typed so that its gradient stays partial sums; here it is summed where it is cut.
        weights = jax.tree.map(lambda array: placed(array, PartitionSpec(*_spec(array).partitions)), weights)
        specs = jax.tree.map(_spec, weights)

        def local(x, valid, expert_counts, weights):
            weights = {name: _read(name, leaf, specs[name], axes, x.dtype) for name, leaf in weights.items()}
            return _on_one_device(self.config, axes, x, valid, expert_counts, weights)

        flags = PartitionSpec(*rows[:2])
        valid = None if valid is None else placed(valid, flags)
        out, stats = jax.shard_map(
            local,
            in_specs=(rows, None if valid is None else flags, PartitionSpec(), specs),
            out_specs=(rows, PartitionSpec()),
            axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        )(placed(x, rows), valid, expert_counts, weights)
        return placed(out, self.place("batch", "residual", None)), stats

    def _weights(self) -> dict[str, Any]:
        c, moe = self.config, self.config.moe
        assert moe is not None
        experts, narrow, wide = moe.num_experts, c.embed_dim, moe.mlp_dim
        init, init_down = nn.initializers.normal(c.init_stddev), nn.initializers.normal(residual_stddev(c))
        into, out_of = ("expert", "expert_embed", "mlp"), ("expert", "mlp", "expert_embed")
        router = _Parameters(
            {"kernel": (init, (narrow, experts), ("embed", "expert_logits"))}
            | ({"bias": (nn.initializers.zeros, (experts,), ("expert_logits",))} if moe.bias_update_rate else {}),
            name="router",
        )()
        kernels = {
            name: _Parameters({"kernel": (initializer, shape, axes)}, name=name)()["kernel"]
            for name, initializer, shape, axes in (
                ("gate", init, (experts, narrow, wide), into),
                ("up", init, (experts, narrow, wide), into),
                ("down", init_down, (experts, wide, narrow), out_of),
            )
        }
        return {f"router_{name}": leaf for name, leaf in router.items()} | kernels


class _Parameters(nn.Module):
    """Parameters in a scope of their own, so that their paths end like every other's: ``NAME/kernel``.

    Attributes:
      specs: of each parameter: initializer, shape, logical axes.
    """

    specs: Mapping[str, tuple[Any, tuple[int, ...], tuple[str, ...]]]

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        return {name: weight(self, name, *spec) for name, spec in self.specs.items()}


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Mesh axes along which tokens are spread, experts, and the width of each expert; and what the mesh is made of."""

    tokens: tuple[str, ...] = ()
    expert: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()
    platform: str | None = None


def _spec(array: jax.Array) -> PartitionSpec:
    return jax.typeof(array).sharding.spec


def _read(name: str, leaf: Any, specs: Any, axes: _Axes, dtype: Any) -> Any:
    """The local part of a weight made as large as this device needs it.

    That is all of the router; of the experts' kernels it is the part of the device's experts and of its share of their
    width. A leaf may hold any number of arrays, each with a placement of its own; inside, they all are cut alike. The
    transpose of each gather is a reduce-scatter, so gradients leave cut as the arrays came.
    """
    is_kernel = name in _EXPERT_KERNELS
    kept = axes.expert + axes.mlp if is_kernel else ()
    # A plain kernel is multiplied in the type of activations: cast first, and half as much moves.
    cast = is_kernel and isinstance(leaf, jax.Array)

    def read(array: jax.Array, spec: PartitionSpec) -> jax.Array:
        placed_on = [name for entry in spec for name in mesh_axes(entry)]
        # Said here, on the smallest array, so that here is where its gradient is summed over the other token axes.
        copies = tuple(name for name in axes.tokens if name not in placed_on)
        array = jax.lax.pcast(array, copies, to="varying") if copies else array
        array = array.astype(dtype) if cast else array
        for dimension, entry in enumerate(spec):
            gathered = tuple(name for name in mesh_axes(entry) if name not in kept)
            if gathered:
                assert gathered == mesh_axes(entry), f"{name}: {spec} cuts one axis for two reasons"
                array = jax.lax.all_gather(array, gathered, axis=dimension, tiled=True)
        return array

    return jax.tree.map(read, leaf, specs)


def _on_one_device(
    config: TransformerConfig,
    axes: _Axes,
    x: jax.Array,
    valid: jax.Array | None,
    expert_counts: jax.Array | None,
    weights: dict[str, Any],
) -> tuple[jax.Array, MoEStats]:
    """The layer for one device's tokens; ``weights`` as `_read` leaves them."""
    moe = config.moe
    assert moe is not None
    tokens = x.reshape(-1, x.shape[-1])
    # Routing in float32: a bf16 logit can flip which expert wins. Accelerators would multiply with fewer bits unasked.
    with jax.default_matmul_precision("float32"):
        logits = dot("te,en->tn", tokens.astype(jnp.float32), weights["router_kernel"])
    bias = materialize(weights["router_bias"]) if "router_bias" in weights else None
    top, chosen, probabilities = route(logits, moe, bias)
    valid = None if valid is None else valid.reshape(-1)
    stats = layer_stats(moe, chosen, probabilities, valid=valid, earlier=expert_counts, axes=axes.tokens)

    def experts(rows: jax.Array, sizes: jax.Array) -> jax.Array:
        gate, up = (ragged_dot(rows, sizes, weights[name]) for name in ("gate", "up"))
        return ragged_dot(activation(config)(gate) * up, sizes, weights["down"])

    # Megatron's f and g: along `mlp` the same tokens enter everywhere (so their gradients are summed: here, before
    # there are top_k of each), and partial sums leave.
    if axes.mlp:
        tokens, top = (jax.lax.pcast(array, axes.mlp, to="varying") for array in (tokens, top))
    out = through_experts(
        tokens,
        top,
        chosen,
        experts,
        moe,
        axis=axes.expert[0] if axes.expert else None,
        platform=axes.platform,
    )
    return jax.lax.psum(out, axes.mlp).reshape(x.shape), stats


def check_experts(config: TransformerConfig, mesh_shape: Mapping[str, int]) -> None:
    """Refuses a mesh whose ``expert`` axis the model cannot use.

    Args:
      config: the model.
      mesh_shape: size of each mesh axis.

    Raises:
      UserError: experts are to be spread that do not exist, or that do not divide evenly.
    """
    degree = mesh_shape.get("expert", 1)
    if degree == 1:
        return
    if config.moe is None:
        raise UserError(f"config.mesh.expert={degree}, but the model has no experts; set config.mesh.expert=1")
    count = config.moe.num_experts
    if count % degree:
        divisors = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise UserError(
            f"config.mesh.expert={degree} does not divide config.model.moe.num_experts={count}; "
            f"choose one of {divisors}"
        )
