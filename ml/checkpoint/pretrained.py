"""Models by folder: a training run's work directory or a Hugging Face folder, read alike; and the former written."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ml.checkpoint.checkpointer import Checkpointer
from ml.checkpoint.params import restore_params
from ml.config import build, to_dict
from ml.errors import UserError
from ml.models.config import TransformerConfig
from ml.models.huggingface import load_config, load_params
from ml.models.huggingface.output_folder import appearing
from ml.models.huggingface.tokenizers import write_tokenizer
from ml.models.quantization import leaf_quantizer, quantize_params
from ml.models.resnet_config import ResNetConfig
from ml.models.two_tower_config import TwoTowerConfig

_EXPERIMENT = "experiment.json"


def load_model(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: Any = None,
    sharding: Callable[[str], jax.sharding.Sharding] | None = None,
    int8: bool = False,
) -> tuple[TransformerConfig, dict[str, Any], Path | None]:
    """Loads a model without knowing which kind of folder holds it.

    Args:
      path: a work directory (``experiment.json``, ``checkpoints/``) or a Hugging Face folder (``config.json``).
      step: which checkpoint of a work directory (its moving average, if it keeps one); ``None``: the newest whole one.
      dtype: of the parameters; ``None``: as saved.
      sharding: placement of each leaf by its path (``"layers/mlp/up/kernel"``); ``None``: the default device.
      int8: see `ml.models.quantization`. Of a Hugging Face folder no more than one leaf is in memory as floats.

    Returns:
      The architecture, its parameters as JAX arrays, and the ``tokenizer.json`` (``None`` if there is none).

    Raises:
      UserError: neither kind of folder, or something in it is missing, damaged or unsupported.
    """
    folder = Path(path).expanduser()
    config = load_model_config(folder)
    return config, _load_params(folder, config, step, dtype, sharding, int8), _tokenizer_in(folder)


def load_model_config(path: str | os.PathLike[str]) -> TransformerConfig:
    """The architecture of the model in a work directory or a Hugging Face folder; errors as `load_model`'s."""
    folder = Path(path).expanduser()
    if (folder / _EXPERIMENT).is_file():
        return _read_experiment(folder / _EXPERIMENT)
    if (folder / "config.json").is_file():
        config = load_config(folder)
        if isinstance(config, TransformerConfig):
            return config
        raise UserError(f"{folder}: holds a CLIP, but here a transformer is needed; name another folder")
    found = "no such folder" if not folder.is_dir() else f"neither {_EXPERIMENT} nor config.json is there"
    raise UserError(f"{folder}: {found}; give a work directory of scripts/train.py or a Hugging Face model folder")


def load_two_tower(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: Any = None,
    sharding: Callable[[str], jax.sharding.Sharding] | None = None,
) -> tuple[TwoTowerConfig, dict[str, Any], Path | None]:
    """`load_model` for models of images and texts: a work directory, or the Hugging Face folder of a CLIP."""
    folder = Path(path).expanduser()
    config = load_two_tower_config(folder)
    return config, _load_params(folder, config, step, dtype, sharding), _tokenizer_in(folder)


def load_two_tower_config(path: str | os.PathLike[str]) -> TwoTowerConfig:
    """`load_model_config` for models of images and texts.

    Raises:
      UserError: neither kind of folder, or another kind of model.
    """
    folder = Path(path).expanduser()
    if (folder / _EXPERIMENT).is_file():
        config = _read_kind(folder / _EXPERIMENT, TwoTowerConfig)
    else:
        config = load_config(folder)
    if not isinstance(config, TwoTowerConfig):
        raise UserError(f"{folder}: holds no model of images and texts; train one with configs/basic, or give a CLIP")
    return config


def load_resnet(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: Any = None,
    sharding: Callable[[str], jax.sharding.Sharding] | None = None,
) -> tuple[ResNetConfig, dict[str, Any], dict[str, Any]]:
    """`load_model` for image classifiers, from the work directory of a training run.

    Returns:
      The architecture, its parameters, and ``model_state``: the collections of running statistics.
    """
    folder = Path(path).expanduser()
    config = load_resnet_config(folder)
    model_state = restore_params(folder, step, subtree="model_state")[1]
    return config, _load_params(folder, config, step, dtype, sharding), model_state


def load_resnet_config(path: str | os.PathLike[str]) -> ResNetConfig:
    """`load_model_config` for image classifiers.

    Raises:
      UserError: no work directory, or one of another kind of model.
    """
    experiment = Path(path).expanduser() / _EXPERIMENT
    if not experiment.is_file():
        raise UserError(f"{path}: has no {_EXPERIMENT}; give the work directory of a run of configs/resnet")
    config = _read_kind(experiment, ResNetConfig)
    if config is None:
        raise UserError(f"{path}: holds no image classifier; give the work directory of a run of configs/resnet")
    return config


def is_two_tower(path: str | os.PathLike[str]) -> bool:
    """Whether a folder of either kind holds a model of images and texts; False where there is no telling."""
    for name, keys, wanted in ((_EXPERIMENT, ("model", "kind"), "two_tower"), ("config.json", ("model_type",), "clip")):
        try:
            value = json.loads((Path(path).expanduser() / name).read_text(encoding="utf-8"))
            for key in keys:
                value = value[key]
            return value == wanted
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return False


def save_workdir(
    folder: str | os.PathLike[str],
    config: TransformerConfig | TwoTowerConfig,
    params: dict[str, Any],
    tokenizer_path: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a model as a work directory with the one checkpoint 0, all of it or nothing.

    Args:
      folder: to be created.
      config: the architecture, written as group ``model`` of ``experiment.json``.
      params: its parameters.
      tokenizer_path: a ``tokenizer.json``, copied with the settings files beside it.

    Raises:
      UserError: the folder is not empty, or the disk is full.
    """
    with appearing(Path(folder).expanduser(), overwrite=False) as partial:
        experiment = {"model": to_dict(config)}
        (partial / _EXPERIMENT).write_text(json.dumps(experiment, indent=2) + "\n", encoding="utf-8")
        if tokenizer_path is not None:
            text = config.text if isinstance(config, TwoTowerConfig) else config
            write_tokenizer(partial, Path(tokenizer_path), text.max_length)
        with Checkpointer(partial) as checkpointer:
            checkpointer.save(0, {"params": params}, None, force=True)


def _read_experiment(path: Path) -> TransformerConfig:
    model = _read_group(path)
    if kind := model.get("kind"):
        raise UserError(
            f"{path}: holds a model of kind {kind!r}, but here a transformer is needed; name another folder"
        )
    return build(TransformerConfig, model, f"{path}: model")


def _read_group(path: Path) -> dict[str, Any]:
    """The group ``model`` of an ``experiment.json``."""
    try:
        experiment = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(experiment, dict) or not isinstance(experiment.get("model"), dict):
        raise UserError(f"{path}: has no group 'model'; is it the experiment.json of a training run?")
    return experiment["model"]


def _read_kind(experiment: Path, kind: Any) -> Any:
    """The architecture in an ``experiment.json``, or ``None`` if it is of another kind."""
    model = _read_group(experiment)
    return build(kind, model, f"{experiment}: model") if model.get("kind") == kind.kind else None


def _load_params(
    folder: Path,
    config: Any,
    step: int | None,
    dtype: Any,
    sharding: Callable[[str], jax.sharding.Sharding] | None,
    int8: bool = False,
) -> dict[str, Any]:
    """The parameters of a folder of either kind, placed; arguments as `load_model`'s."""
    if not (folder / _EXPERIMENT).is_file():
        if step is not None:
            raise UserError(f"{folder}: a Hugging Face folder has no checkpoint steps; leave the step out")
        finish = leaf_quantizer(config, donate=True) if int8 else None
        return load_params(folder, config, dtype=dtype, sharding=sharding, finish=finish)
    params = params_to_evaluate(folder, step, dtype)
    if sharding is not None:
        params = jax.tree.map_with_path(lambda keys, leaf: _place(leaf, sharding(leaf_path(keys))), params)
    return quantize_params(config, params, donate=True) if int8 else params


def _tokenizer_in(folder: Path) -> Path | None:
    tokenizer = folder / "tokenizer.json"
    return tokenizer if tokenizer.is_file() else None


def params_to_evaluate(folder: Path, step: int | None, dtype: Any) -> dict[str, Any]:
    """The parameters that the run itself evaluates: a moving average, schedule-free's average, or just ``params``.

    Args:
      folder: the run's work directory.
      step: of the checkpoint; ``None``: the newest whole one.
      dtype: ``None``: as saved.

    Raises:
      UserError: there is no such checkpoint.
    """
    experiment = json.loads((folder / _EXPERIMENT).read_text(encoding="utf-8"))
    if experiment.get("train", {}).get("ema"):
        return restore_params(folder, step, dtype=dtype, subtree="ema")[1]
    if not experiment.get("optimizer", {}).get("name", "").startswith("schedule_free"):
        return restore_params(folder, step, dtype=dtype)[1]
    step, params = restore_params(folder, step)
    state = _schedule_free_state(restore_params(folder, step, subtree="opt_state")[1])
    b1 = state["b1"]
    average = jax.tree.map(lambda y, z: (y - (1 - b1) * z) / b1, params, state["z"])
    return average if dtype is None else jax.tree.map(lambda x: x.astype(dtype), average)


def _schedule_free_state(tree: Any) -> dict[str, Any]:
    """The node of a restored optimizer state that holds schedule-free's iterate ``z`` (Defazio et al. 2024)."""
    if not isinstance(tree, dict):
        return {}
    if {"z", "b1"} <= tree.keys():
        return tree
    return next(filter(None, map(_schedule_free_state, tree.values())), {})


def _place(leaf: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """Puts a leaf that each process has read on the devices of all processes; each copies its own shards only."""
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def leaf_path(keys: tuple[Any, ...]) -> str:
    """A leaf's name, such as ``layers/mlp/up/kernel``, from the keys that `jax.tree` gives."""
    return "/".join(str(getattr(key, "key", key)) for key in keys)
