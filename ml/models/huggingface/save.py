"""The parameter tree out to a Hugging Face folder that transformers loads."""

import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ml.errors import UserError
from ml.models.huggingface.clip_config import add_end_token, write_pixels
from ml.models.huggingface.names import Config, leaf_shapes, tensors
from ml.models.huggingface.output_folder import appearing
from ml.models.huggingface.safetensors_io import CHUNK_BYTES, Outgoing, storable_dtype, write
from ml.models.huggingface.tensor import Tensor
from ml.models.huggingface.tokenizers import special_ids, write_tokenizer
from ml.models.huggingface.write_config import write_config
from ml.models.two_tower_config import TwoTowerConfig
from ml.weights import materialize

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def save_pretrained(
    folder: str | Path,
    config: Config,
    params: dict[str, Any],
    tokenizer_path: str | Path | None = None,
    *,
    max_shard_size: int | str = "5GB",
    dtype: Any = None,
    overwrite: bool = False,
) -> None:
    """Writes a folder that transformers' ``from_pretrained`` loads, all of it or nothing.

    Streamed: beside ``params``, host memory holds one layer of one leaf. Typed leaves are written as the dense arrays
    they stand for, one leaf at a time.

    Args:
      folder: to be created. It appears only when complete.
      config: the architecture; the Hugging Face family follows from it.
      params: NumPy or JAX arrays, or registered weight types, all addressable from this process.
      tokenizer_path: a ``tokenizer.json``, written with the ``tokenizer_config.json`` that lies beside it or one that
        names the end-of-text token.
      max_shard_size: bytes, or text like ``"5GB"``: larger checkpoints are split, with an index.
      dtype: of the stored weights; ``None``: each leaf's own.
      overwrite: replace a folder that is not empty.

    Raises:
      UserError: no family expresses ``config``, the folder is not empty, the tree does not fit, or the disk is full.
    """
    folder = Path(folder)
    family, values = write_config(config)
    leaves = _leaves(params)
    _check(config, leaves)
    dtypes = {path: storable_dtype(_dtype(leaf) if dtype is None else dtype) for path, leaf in leaves.items()}
    table = tensors(config, family)
    stored = str(dtypes[table[0].parts[0].path])
    values |= {"torch_dtype": stored, "dtype": stored}  # the first spelling is for transformers 4, the second for 5
    text = config.text if isinstance(config, TwoTowerConfig) else config
    ids = {} if tokenizer_path is None else special_ids(tokenizer_path, text.vocab_size)
    if text is config:
        values |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **ids}  # not the family's own ids
    elif ids:
        add_end_token(values, ids)
    source = _Source(leaves)
    outgoing = [
        Outgoing(tensor.name, tensor.shape, dtypes[tensor.parts[0].path], functools.partial(source.rows, tensor))
        for tensor in table
    ]
    shards = _split(outgoing, _parse_size(max_shard_size))
    with appearing(folder, overwrite) as partial:
        (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        if tokenizer_path is not None:
            write_tokenizer(partial, tokenizer_path, text.max_length)
        if isinstance(config, TwoTowerConfig):
            write_pixels(partial, config)
        _write_weights(partial, shards)


class _Source:
    """Gives pieces of the leaves as host arrays; a typed leaf is made dense once, until the next leaf is asked for."""

    def __init__(self, leaves: dict[str, Any]):
        self._leaves = leaves
        self._dense: dict[str, Any] = {}

    def rows(self, tensor: Tensor) -> Iterator[np.ndarray]:
        """Consecutive rows of a checkpoint tensor, about `CHUNK_BYTES` at a time."""
        views = []
        for part in tensor.parts:
            leaf = self._dense_leaf(part.path, keep={part.path for part in tensor.parts})
            views.append(part.view(_on_host(leaf, part.index)))
        row_bytes = sum(math.prod(view.shape[1:]) * view.dtype.itemsize for view in views)
        step = max(1, CHUNK_BYTES // max(row_bytes, 1))
        for first in range(0, len(views[0]), step):
            pieces = [view[first : first + step] for view in views]
            yield pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)

    def _dense_leaf(self, path: str, keep: set[str]) -> Any:
        if path not in self._dense:
            self._dense = {name: array for name, array in self._dense.items() if name in keep}
            self._dense[path] = materialize(self._leaves[path])
        return self._dense[path]


def _on_host(leaf: Any, index: tuple[int, ...]) -> np.ndarray:
    """``leaf[index]``; of an array on an accelerator only this much comes to the host."""
    if (
        isinstance(leaf, jax.Array)
        and {device.platform for device in leaf.devices()} == {"cpu"}
        and leaf.is_fully_replicated
    ):
        leaf = np.asarray(leaf)  # no copy
    return np.asarray(leaf[index] if index else leaf)


def _write_weights(folder: Path, shards: list[list[Outgoing]]) -> None:
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        write(folder / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(table: list[Outgoing], limit: int) -> list[list[Outgoing]]:
    """Consecutive tensors into shards of at most ``limit`` bytes; a larger tensor has a shard of its own."""
    shards: list[list[Outgoing]] = [[]]
    used = 0
    for tensor in table:
        if shards[-1] and used + tensor.nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.nbytes
    return shards


def _parse_size(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if not match or match[2].upper() not in _UNITS or not float(match[1]) > 0:
        raise UserError(f"max_shard_size {size!r}: expected bytes, or text like '5GB' or '500MB'")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def _dtype(leaf: Any) -> Any:
    return jax.eval_shape(materialize, leaf).dtype


def _check(config: Config, leaves: dict[str, Any]) -> None:
    """Compares the tree with the architecture."""
    shapes = leaf_shapes(config)
    for path, shape in shapes.items():
        if path not in leaves:
            raise UserError(f"params lack {path}, which the architecture has")
        found = jax.eval_shape(materialize, leaves[path]).shape
        if found != shape:
            raise UserError(f"params: {path} has shape {list(found)}; the architecture wants {list(shape)}")
    if extra := sorted(set(leaves) - set(shapes)):
        raise UserError(f"params hold {extra[0]}, which the architecture lacks")
