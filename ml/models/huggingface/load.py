"""Hugging Face weights into the parameter tree, a few rows at a time."""

import collections
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ml.errors import UserError
from ml.models.huggingface import transpose
from ml.models.huggingface.names import Config, ignored, leaf_shapes, repeated, tensors
from ml.models.huggingface.read_config import parse_config, read_json
from ml.models.huggingface.safetensors_io import FLOAT_DTYPES, SafetensorsFile, storable_dtype
from ml.models.huggingface.tensor import Tensor

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ALIGNMENT = 64


def load_params(
    folder: str | Path,
    config: Config,
    *,
    dtype: Any = None,
    sharding: Callable[[str], jax.sharding.Sharding] | None = None,
    finish: Callable[[str, jax.Array], Any] | None = None,
) -> dict[str, Any]:
    """Reads the weights of a Hugging Face model folder into the parameter tree of its module.

    Streamed: beside the result, host memory holds a chunk of a tensor (16 MB) and the leaf being filled, which on the
    CPU becomes the result itself.

    Args:
      folder: holds ``config.json`` and ``model.safetensors``, or ``model.safetensors.index.json`` and its shards.
      config: the folder's architecture, from `load_config`.
      dtype: of the result; ``None``: each leaf as stored (float32 where its layers differ).
      sharding: placement of each leaf by its path (``"layers/attention/query/kernel"``); called once a leaf, on every
        process of a multi-process run. ``None``: the default device.
      finish: what becomes of each leaf, by its path, before the next is read: `ml.models.quantization.leaf_quantizer`.

    Raises:
      UserError: a missing, unexpected, wrongly shaped, quantized or truncated tensor or file (named).
    """
    folder = Path(folder)
    family = parse_config(*read_json(folder))[0]
    files = _open(folder)
    table = tensors(config, family, files)
    _check(folder, config, table, files)

    shapes, dtypes = leaf_shapes(config), _leaf_dtypes(table, files, dtype)
    pending = collections.Counter(part.path for tensor in table for part in tensor.parts)
    filling: dict[str, np.ndarray] = {}
    params: dict[str, Any] = {}
    for tensor in table:
        targets = []
        for part in tensor.parts:
            if part.path not in filling:
                filling[part.path] = _allocate(shapes[part.path], dtypes[part.path])
            leaf = filling[part.path]
            targets.append(part.view(leaf[part.index] if part.index else leaf))  # an index would copy a scalar
        _copy_rows(files[tensor.name], tensor, targets)
        for part in tensor.parts:
            pending[part.path] -= 1
            if not pending[part.path]:
                placed = _place(filling.pop(part.path), (sharding or _on_default_device)(part.path))
                _insert(params, part.path, placed if finish is None else finish(part.path, placed))
    for name, first in repeated(config, table).items():
        if name in files:
            _check_tied(files, name, first)
    return params


def _leaf_dtypes(table: list[Tensor], files: dict[str, SafetensorsFile], dtype: Any) -> dict[str, np.dtype]:
    stored: dict[str, set[np.dtype]] = collections.defaultdict(set)
    for tensor in table:
        for part in tensor.parts:
            # Reading refuses whatever is not a plain float, so its stand-in here is never used.
            code = files[tensor.name].entries[tensor.name].dtype
            stored[part.path].add(FLOAT_DTYPES.get(code, np.dtype(np.float32)))
    if dtype is not None:
        return dict.fromkeys(stored, storable_dtype(dtype))
    return {path: found.pop() if len(found) == 1 else np.dtype(np.float32) for path, found in stored.items()}


def _copy_rows(file: SafetensorsFile, tensor: Tensor, targets: list[np.ndarray]) -> None:
    for first, rows in file.rows(tensor.name):
        offset = 0
        for target in targets:
            destination = target[first : first + len(rows)]
            width = target.shape[1]
            transpose.copy(destination, rows[:, offset : offset + width])
            offset += width


def _allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array, aligned so that JAX on a CPU takes it over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _on_default_device(path: str) -> jax.sharding.Sharding:
    default = jax.config.jax_default_device
    device = default if isinstance(default, jax.Device) else jax.local_devices()[0]
    return jax.sharding.SingleDeviceSharding(device)


def _place(leaf: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    # By callback, for processes that hold only some of the shards.
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def _insert(params: dict[str, Any], path: str, leaf: Any) -> None:
    *scopes, name = path.split("/")
    for scope in scopes:
        params = params.setdefault(scope, {})
    params[name] = leaf


def _open(folder: Path) -> dict[str, SafetensorsFile]:
    """Tensor name -> the file that holds it."""
    if (folder / _INDEX).exists():
        try:
            weight_map = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            wanted = {str(name): str(shard) for name, shard in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / _INDEX}: malformed ({error}); download it again") from None
        shards = sorted(set(wanted.values()))
        for shard in shards:
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise UserError(f"{folder / shard}: no such file, though {_INDEX} lists it; download it again")
        files = {name: file for shard in shards for file in [SafetensorsFile(folder / shard)] for name in file.entries}
        for name, shard in wanted.items():
            if name not in files:
                raise UserError(
                    f"{folder / shard}: lacks tensor {name}, which {_INDEX} places there; download it again"
                )
        return files
    if (folder / _WEIGHTS).exists():
        file = SafetensorsFile(folder / _WEIGHTS)
        return dict.fromkeys(file.entries, file)
    if found := sorted(path.name for path in folder.glob("*.bin")):
        raise UserError(
            f"{folder / found[0]}: a pickle, which is never loaded; convert it with transformers: "
            f"AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)"
        )
    raise UserError(f"{folder}: neither {_WEIGHTS} nor {_INDEX} is there; download the weights as safetensors")


def _check(folder: Path, config: Config, table: Iterable[Tensor], files: dict[str, SafetensorsFile]) -> None:
    """Compares names and shapes before anything is read."""
    where = f"in {_INDEX if (folder / _INDEX).exists() else _WEIGHTS}"
    names = {tensor.name for tensor in table} | set(repeated(config, list(table)))
    for tensor in table:
        if tensor.name not in files:
            raise UserError(f"{folder}: tensor {tensor.name} is missing {where}; config.json promises it")
        entry = files[tensor.name].entries[tensor.name]
        if entry.shape != tensor.shape:
            raise UserError(
                f"{files[tensor.name].path}: tensor {tensor.name} has shape {list(entry.shape)}; "
                f"by config.json it must be {list(tensor.shape)}"
            )
    for name, file in files.items():
        if name not in names and not ignored(name, config):
            raise UserError(f"{file.path}: unexpected tensor {name}: config.json describes an architecture without it")


def _check_tied(files: dict[str, SafetensorsFile], name: str, first: str) -> None:
    """A tied checkpoint may repeat its embedding as ``lm_head``, but not contradict it."""
    file, other = files[name], files[first]
    same = file.entries[name].shape == other.entries[first].shape
    pairs = zip(file.rows(name), other.rows(first), strict=False)
    if not same or not all(np.array_equal(a, b) for (_, a), (_, b) in pairs):
        raise UserError(
            f"{file.path}: {name} differs from {first}, yet config.json ties them; "
            "set tie_word_embeddings to false there"
        )
