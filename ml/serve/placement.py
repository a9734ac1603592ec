"""Where an engine's arrays lie on a mesh: weights by the rule table, the cache by its heads, the rest everywhere."""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ml.errors import UserError
from ml.models import TransformerConfig, logical_axes
from ml.parallel import AXES, MeshConfig, Rules, make_mesh
from pallas_kernels.paged_attention import PagedCache

# Pages and what lies in a page are whole on every device that has them.
_CACHE_AXES = PagedCache(
    key=(None, None, None, "kv_heads", None),  # type: ignore[arg-type]
    value=(None, None, None, "kv_heads", None),  # type: ignore[arg-type]
    key_scale=(None, None, "kv_heads", None),  # type: ignore[arg-type]
    value_scale=(None, None, "kv_heads", None),  # type: ignore[arg-type]
)

_LAUNCHING = threading.Lock()


class MeshError(UserError):
    """A mesh that is not to be had here, or that does not suit a model; begins with the axis: ``tensor=4:``."""


def serving_mesh(data: int = 1, tensor: int = 1) -> Mesh | None:
    """A mesh of the first ``data * tensor`` devices; ``None`` for one device.

    Args:
      data: replicas of the engine, each with a part of the requests.
      tensor: devices that share a replica's heads, MLP width and vocabulary.

    Raises:
      MeshError: there are not that many devices.
    """
    devices = jax.devices()
    for name, size, other in (("tensor", tensor, 1), ("data", data, tensor)):
        if not 1 <= size * other <= len(devices):
            room = len(devices) // other
            beside = f" of {other} devices each" if other > 1 else ""
            raise MeshError(
                f"{name}={size}: there are {len(devices)} devices, room for 1 to {room}{beside}; choose one of these"
            )
    if data * tensor == 1:
        return None
    return make_mesh(MeshConfig(data=data, tensor=tensor), devices[: data * tensor])


def replica_meshes(mesh: Mesh) -> list[Mesh]:
    """The slices of a mesh along ``data``."""
    axis = AXES.index("data")
    parts = np.split(mesh.devices, mesh.shape["data"], axis)
    return [Mesh(part, mesh.axis_names, axis_types=mesh.axis_types) for part in parts]


class Placement:
    """Places what a model and its engine consist of; without a mesh, everything is where JAX puts it.

    Attributes:
      mesh: the devices; ``None``: one.
      config: of the model as it is placed: where there are fewer key/value heads than devices along ``tensor``, each
        head is there several times, next to itself, so that every device has the one that its query heads need.
    """

    def __init__(self, config: TransformerConfig, mesh: Mesh | None = None):
        """Checks that the model fits the mesh.

        Args:
          config: of the model.
          mesh: from `serving_mesh`, or any other of `ml.parallel.make_mesh` whose axes but ``data`` and ``tensor`` are
            one device long.

        Raises:
          MeshError: the mesh has another axis, or the model's heads or widths do not divide.
        """
        self.mesh = mesh
        self._rules = None if mesh is None else Rules(mesh, layout="ddp")
        self._degree = 1 if mesh is None else mesh.shape["tensor"]
        if mesh is not None:
            _check(config, mesh)
        self._copies = max(1, self._degree // config.num_kv_heads)
        self.config = dataclasses.replace(config, num_kv_heads=config.num_kv_heads * self._copies)
        # A vocabulary is whatever the tokenizer's is; one that does not divide stays whole.
        self._vocab: str | None = None if config.vocab_size % self._degree else "vocab"

    def spec(self, *axes: str | None) -> PartitionSpec | None:
        """The placement of an array whose axes have these logical names; for `ml.models.Transformer`."""
        if self._rules is None:
            return None
        return self._rules.spec(*(self._vocab if axis == "vocab" else axis for axis in axes))

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        """In which a program for the mesh is launched: two threads must not launch on its devices in two orders."""
        if self.mesh is None:
            yield
        else:
            with _LAUNCHING:
                yield

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """In which programs for the mesh are traced."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    @property
    def on_one_device(self) -> TransformerConfig:
        """The model, with the heads that one device has."""
        heads, kv_heads = (n // self._degree for n in (self.config.num_heads, self.config.num_kv_heads))
        return dataclasses.replace(self.config, num_heads=heads, num_kv_heads=kv_heads)

    def of_leaf(self, path: str) -> jax.sharding.Sharding:
        """The placement of a parameter by its path, for `ml.checkpoint.pretrained.load_model`; on a mesh only."""
        axes = self._axes
        for name in path.split("/"):
            axes = axes[name]
        # Heads that each device needs a copy of are whole until `params` makes the copies.
        return self._sharding([None if axis == "kv_heads" and self._copies > 1 else axis for axis in axes])

    @functools.cached_property
    def _axes(self) -> Any:
        return logical_axes(self.config)

    def params(self, params: PyTree) -> PyTree:
        """Parameters in their places; what is there already is not copied.

        Arrays of a typed leaf lie as the weight does that it stands for, along the axes that they have as it has.
        """
        if self.mesh is None:
            return params

        def place(axes: tuple[str, ...], leaf: Any) -> Any:
            return jax.tree.map(functools.partial(self._put, axes), leaf)

        return jax.tree.map(place, self._axes, params, is_leaf=_is_axes)

    def _put(self, axes: tuple[str, ...], array: Any) -> Any:
        if len(axes) != array.ndim:
            return _moved(array, self._sharding([None] * array.ndim))
        if "kv_heads" in axes and array.shape[axes.index("kv_heads")] * self._copies == self.config.num_kv_heads:
            array = np.repeat(array, self._copies, axes.index("kv_heads")) if self._copies > 1 else array
        return _moved(array, self._sharding([axes[i] if n > 1 else None for i, n in enumerate(array.shape)]))

    def cache(self, make: Callable[[], PagedCache]) -> PagedCache:
        """The cache that ``make`` makes, of which each device makes its own part."""
        if self.mesh is None:
            return make()
        shapes = jax.eval_shape(make)
        places = jax.tree.map(lambda axes, _: self._sharding(axes), _CACHE_AXES, shapes, is_leaf=_is_axes)
        return jax.jit(make, out_shardings=places)()

    def whole(self, tree: PyTree) -> PyTree:
        """Arrays on every device of the mesh."""
        return jax.device_put(tree, None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec()))

    def described(self, tree: PyTree) -> PyTree:
        """What programs are compiled for that will get such arrays: those of the host arrive on every device."""

        whole = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

        def describe(x: Any) -> Any:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", whole))

        return jax.tree.map(describe, tree)

    def _sharding(self, axes: Sequence[str | None]) -> NamedSharding:
        spec = self.spec(*axes)
        assert self.mesh is not None and spec is not None
        return NamedSharding(self.mesh, spec)


def _check(config: TransformerConfig, mesh: Mesh) -> None:
    for name, size in mesh.shape.items():
        if size > 1 and name not in ("data", "tensor"):
            raise MeshError(f"mesh axis {name}={size}: engines know data and tensor only; make it 1")
    degree, heads, kv_heads = mesh.shape["tensor"], config.num_heads, config.num_kv_heads
    width = config.mlp_dim if config.moe is None else config.moe.mlp_dim
    fits = [
        n for n in range(1, heads + 1) if not heads % n and not width % n and (not kv_heads % n or not n % kv_heads)
    ]
    if degree not in fits:
        raise MeshError(
            f"tensor={degree}: {heads} attention heads, {kv_heads} key/value heads and an MLP of {width} cannot be "
            f"dealt evenly to so many devices; choose one of {', '.join(map(str, fits))}, and give the other devices "
            "to data"
        )


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple)


def _moved(leaf: Any, place: NamedSharding) -> Any:
    """A leaf in its place: a replica's part of an array that lies on all replicas is taken as it is."""
    if not isinstance(leaf, jax.Array) or leaf.sharding == place:
        return jax.device_put(leaf, place)
    held = {shard.device: shard for shard in leaf.addressable_shards}
    wanted = place.devices_indices_map(leaf.shape)
    if all(device in held and held[device].index == index for device, index in wanted.items()):
        shards = [held[device].data for device in wanted]
        return jax.make_array_from_single_device_arrays(leaf.shape, place, shards)
    return jax.device_put(leaf, place)
