"""A training state as named arrays: their names, the comparison with what is wanted, and what is stored of them.

Stored are nested dicts of plain arrays, whatever containers the state is made of (dataclasses, named tuples, optax
states), so a checkpoint can be read in part and by other tools. The containers come from the code that restores.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ml.errors import UserError

Specs = Mapping[str, tuple[tuple[int, ...], str]]
_STATE_MEND = "it was saved with another model or optimizer: use that configuration, or a new workdir"


def named_leaves(tree: Any) -> dict[str, Any]:
    """Maps names such as ``params/layers/mlp/up/kernel`` to the leaves of ``tree``, in the tree's order.

    Raises:
      ValueError: the tree is a bare leaf, or two of its leaves have one name.
      TypeError: a leaf is neither an array nor a description of one.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = "/".join(_key(entry) for entry in path)
        if not name or name in leaves:
            raise ValueError(f"cannot name the leaf at {jax.tree_util.keystr(path)!r} uniquely")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(f"{name} is a {type(leaf).__name__}; a checkpoint holds arrays (wrap it with jnp.asarray)")
        leaves[name] = leaf
    return leaves


def specs(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of every leaf."""
    return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in named_leaves(tree).items()}


def check(saved: Specs, wanted: Specs, where: str, mend: str = _STATE_MEND, check_dtypes: bool = True) -> None:
    """Compares names, shapes and dtypes; nothing is ever cast, padded or left out silently.

    Raises:
      UserError: naming the first leaf that differs.
    """
    missing = [name for name in wanted if name not in saved]
    if missing:
        raise UserError(f"{where} lacks {_some(missing)}; {mend}")
    extra = [name for name in saved if name not in wanted]
    if extra:
        raise UserError(f"{where} also holds {_some(extra)}, for which there is no place; {mend}")
    for name, (shape, dtype) in wanted.items():
        saved_shape, saved_dtype = saved[name]
        if shape != saved_shape or (check_dtypes and dtype != saved_dtype):
            raise UserError(
                f"{where}: {name} is {_text(saved_shape, saved_dtype)}, wanted {_text(shape, dtype)}; {mend}"
            )


def to_stored(tree: Any) -> dict[str, Any]:
    """Nested dicts of the arrays to store. PRNG keys become their data; arrays without elements are left out."""
    return _nest({name: _storable(leaf) for name, leaf in named_leaves(tree).items() if leaf.size})


def wanted_arrays(tree: Any, dtype: Any = None) -> dict[str, Any]:
    """What to ask of storage for ``tree``: nested dicts of ``jax.ShapeDtypeStruct`` with concrete shardings.

    A leaf without a sharding goes to the default device. ``dtype`` replaces floating dtypes.
    """
    wanted = {}
    for name, leaf in named_leaves(tree).items():
        shape, leaf_dtype = leaf.shape, leaf.dtype
        if 0 in shape:
            continue
        if _is_key(leaf_dtype):
            data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, leaf_dtype))
            shape, leaf_dtype = data.shape, data.dtype
        elif dtype is not None and jnp.issubdtype(leaf_dtype, jnp.floating):
            leaf_dtype = dtype
        wanted[name] = jax.ShapeDtypeStruct(shape, leaf_dtype, sharding=_sharding(leaf))
    return _nest(wanted)


def from_stored(stored: Mapping[str, Any], tree: Any) -> Any:
    """Fills the containers of ``tree`` with the ``stored`` arrays."""
    leaves = []
    for name, leaf in named_leaves(tree).items():
        if 0 in leaf.shape:
            leaves.append(jax.device_put(np.zeros(leaf.shape, leaf.dtype), _sharding(leaf)))
            continue
        value: Any = stored
        for part in name.split("/"):
            value = value[part]
        leaves.append(jax.random.wrap_key_data(value, impl=_implementation(leaf)) if _is_key(leaf.dtype) else value)
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def from_specs(saved: Specs) -> dict[str, Any]:
    """Nested dicts of ``jax.ShapeDtypeStruct`` on the default device, for reading without knowing the containers."""
    return _nest({name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for name, (shape, dtype) in saved.items()})


def _key(entry: Any) -> str:
    """One step of a path; slashes are escaped, so that a name can be taken apart again."""
    if isinstance(entry, jax.tree_util.GetAttrKey):
        text = entry.name
    elif isinstance(entry, jax.tree_util.SequenceKey):
        text = str(entry.idx)
    else:
        text = str(entry.key)
    return text.replace("%", "%25").replace("/", "%2F")


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _storable(leaf: Any) -> Any:
    if _is_key(leaf.dtype):
        return jax.random.key_data(leaf)
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def _implementation(leaf: Any) -> str:
    """The name that ``jax.random.wrap_key_data`` wants; keys tell it, descriptions of keys only when traced."""
    names: list[Any] = []
    jax.eval_shape(lambda key: names.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return names[0]


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(sharding, jax.sharding.NamedSharding) and isinstance(sharding.mesh, jax.sharding.AbstractMesh):
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise ValueError("the abstract state's mesh has no devices: restore inside `with jax.set_mesh(mesh)`")
        return jax.sharding.NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)
    return sharding


def _some(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _text(shape: tuple[int, ...], dtype: str) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"
