"""The flags ``--config=FILE[:ARG]`` and ``--config.a.b=value``: a Python file, and changes to what it returns."""

import ast
import importlib.util
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from ml.errors import UserError, nearest

# `--config` then belongs to the script that called `define`, and appears in its --help.
flags.disclaim_key_flags()

_EXAMPLE = "--config=configs/lm/quickstart.py"
_NAME = re.compile(r"[A-Za-z_][\w-]*(\[\d+\])*(\.[A-Za-z_][\w-]*(\[\d+\])*)*")


def define(
    default: str | None = None,
    *,
    flag_values: flags.FlagValues = flags.FLAGS,
    argv: Sequence[str] | None = None,
) -> None:
    """Defines ``--config`` and every ``--config.a.b`` that the command line holds.

    absl refuses flags it does not know, and which keys exist is known only once the file is read; so names are taken
    from ``argv`` now, and checked by `load`.

    Args:
      default: the file to read where ``--config`` is not given.
      flag_values: where to define.
      argv: the command line; default ``sys.argv``.
    """
    help_text = f"experiment file, FILE.py or FILE.py:ARG; change a key with --config.KEY=VALUE, such as {_EXAMPLE}"
    flag = _ConfigFlag("config", default, help_text)
    flags.DEFINE_flag(flag, flag_values)
    for argument in (sys.argv if argv is None else argv)[1:]:
        if argument == "--":
            break
        name = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and name.startswith("config.") and name not in flag_values:
            # Filed under this module, or else --help would list what the user has just typed.
            flags.DEFINE_flag(_OverrideFlag(name, flag.overrides), flag_values, module_name=__name__)


def load(*, flag_values: flags.FlagValues = flags.FLAGS) -> ConfigDict:
    """Reads the file that ``--config`` names and applies the overrides in the order of the command line.

    A value is read as the type of the one it replaces: ``true``/``false``, a number, text, a list (``[1, 2]`` or
    ``1,2``). ``null`` is always ``None``. Where the present value is ``None`` or a group, the text is read as JSON, and
    as plain text where it is not JSON.

    Raises:
      UserError: no ``--config``, no such file, a file without ``get_config`` or one that fails (with its line), an
        unknown key (names the nearest), a value of the wrong type.
    """
    flag = flag_values["config"]
    assert isinstance(flag, _ConfigFlag)
    if not flag.value:
        raise UserError(f"--config is missing: name an experiment file, as in {_EXAMPLE}")
    config = load_file(flag.value)
    with config.unlocked():
        for name, text in flag.overrides:
            override(config, name, text)
    return config.lock()


def load_file(spec: str) -> ConfigDict:
    """Returns what ``get_config`` of a Python file returns; ``spec`` is ``FILE`` or ``FILE:ARG``.

    Raises:
      UserError: see `load`.
    """
    match = re.fullmatch(r"(.*?\.py)(?::(.*))?", spec, re.DOTALL)
    path, argument = (match[1], match[2]) if match else (spec, None)
    get_config = _get_config(path)
    if argument is not None and not inspect.signature(get_config).parameters:
        raise UserError(f"--config={spec}: its get_config() takes no :ARG; write --config={path}")
    try:
        result = get_config() if argument is None else get_config(argument)
    except UserError as error:
        raise UserError(f"--config={spec}: {error}") from error
    except Exception as error:
        raise UserError(f"--config: {_place(error, path)}: {_describe(error)}") from error
    if not isinstance(result, ConfigDict | Mapping):
        raise UserError(
            f"--config={path}: get_config returned {type(result).__name__}; it must return a ml_collections.ConfigDict"
        )
    config = result if isinstance(result, ConfigDict) else ConfigDict(result)
    return config.copy_and_resolve_references()


def override(config: ConfigDict, name: str, text: str) -> None:
    """Sets one key, in place.

    Args:
      config: unlocked.
      name: dotted, with ``config.`` in front, such as ``config.data.sources[0].path``.
      text: the value as typed; see `load`.

    Raises:
      UserError: see `load`.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"--{name}: not a key; write --config.KEY=VALUE, with [0], [1]... for entries of a list")
    keys = [int(key) if key.isdigit() else key for key in re.findall(r"[^.\[\]]+", name)]
    with config.ignore_type():
        _assign(config, keys[1:], text, "config", config)


class _OpenGroup(ConfigDict):
    """A group that flags have made, where the file has ``None``: its keys are checked where they are read."""


class _ConfigFlag(flags.Flag):
    """``--config``; also gathers the overrides, in the order of the command line."""

    def __init__(self, name: str, default: str | None, help_string: str):
        self.overrides: list[tuple[str, str]] = []
        super().__init__(flags.ArgumentParser(), flags.ArgumentSerializer(), name, default, help_string)

    def parse(self, argument: Any) -> None:
        if isinstance(argument, str) and (not argument or argument.startswith("-")):
            raise UserError(f"--config has no value; name an experiment file, as in {_EXAMPLE}")
        super().parse(argument)


class _OverrideFlag(flags.Flag):
    """One ``--config.a.b``."""

    def __init__(self, name: str, overrides: list[tuple[str, str]]):
        self._overrides = overrides
        super().__init__(flags.ArgumentParser(), None, name, None, "changes one key of --config")

    def parse(self, argument: Any) -> None:
        if isinstance(argument, str) and argument.startswith("--"):
            raise UserError(f"--{self.name} has no value; write --{self.name}=VALUE")
        self._overrides.append((self.name, argument))
        super().parse(argument)


def _get_config(path: str) -> Callable[..., Any]:
    """Runs the file and returns its ``get_config``."""
    if not os.path.isfile(path):
        raise UserError(f"--config={path}: {_missing(path)}")
    module_spec = importlib.util.spec_from_file_location("_config_file", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config={path}: not a Python file; write FILE.py or FILE.py:ARG")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except UserError as error:
        raise UserError(f"--config={path}: {error}") from error
    except Exception as error:
        raise UserError(f"--config: {_place(error, path)}: {_describe(error)}") from error
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"--config={path}: it lacks a function get_config(arg='') that returns a ConfigDict")
    return module.get_config


def _missing(path: str) -> str:
    directory = path if os.path.isdir(path) else os.path.dirname(path) or "."
    if not os.path.isdir(directory):
        return f"no such file, and no directory {directory}"
    files = [name for name in os.listdir(directory) if name.endswith(".py") and not name.startswith("_")]
    if not files:
        return f"no such file, and no .py file in {directory}"
    kind = "a directory" if os.path.isdir(path) else "no such file"
    wanted = "" if os.path.isdir(path) else os.path.basename(path)
    hint = nearest(wanted, [os.path.normpath(os.path.join(directory, name)) for name in files])
    if wanted and hint.startswith("valid"):  # bare names resemble each other more than whole paths do
        hint = nearest(wanted, files)
    return f"{kind}; {hint}"


def _place(error: Exception, path: str) -> str:
    """``file:line`` of the innermost frame within the config file; of a syntax error, where it lies."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if os.path.abspath(frame.filename) == os.path.abspath(path)
    ]
    return f"{path}:{lines[-1]}" if lines else path


def _describe(error: Exception) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}" if text else type(error).__name__


def _assign(value: Any, keys: list[str | int], text: str, name: str, root: ConfigDict) -> Any:
    """Returns ``value`` with the entry at ``keys`` replaced; groups change in place, lists and tuples are made anew."""
    if not keys:
        return _parse(text, value, name)
    key, rest = keys[0], keys[1:]
    inner = f"{name}[{key}]" if isinstance(key, int) else f"{name}.{key}"
    if isinstance(key, int):
        if not isinstance(value, list | tuple):
            raise UserError(f"--{inner}: {name} is not a list, it is {_show(value)}")
        if key >= len(value):
            raise UserError(f"--{inner}: {name} has {len(value)} entries; set it whole, as in --{name}='[...]'")
        entries = list(value)
        entries[key] = _assign(entries[key], rest, text, inner, root)
        return type(value)(entries)
    if value is None:
        return _OpenGroup({key: _assign(None, rest, text, inner, root)})
    if isinstance(value, list | tuple):
        raise UserError(f"--{inner}: {name} is a list; name an entry, as in --{name}[0].{key}")
    if not isinstance(value, MutableMapping | ConfigDict):
        raise UserError(f"--{inner}: {name} has no keys, it is {_show(value)}")
    if key not in value and value and not isinstance(value, _OpenGroup):
        raise UserError(f"--{inner}: no such key; {_nearest_key(inner, value, root)}")
    value[key] = _assign(value.get(key), rest, text, inner, root)
    return value


def _nearest_key(name: str, siblings: Mapping[str, Any], root: ConfigDict) -> str:
    """Points to a sibling that is spelled alike, or else to the same key in another group."""
    parent, _, key = name.rpartition(".")
    hint = nearest(key, siblings)
    if hint.startswith("did you mean"):
        return hint.replace("'", f"'--{parent}.", 1)
    elsewhere = [dotted for dotted in _dotted(root, "config") if dotted.rpartition(".")[2] == key]
    return f"did you mean '--{elsewhere[0]}'?" if elsewhere else hint


def _dotted(group: Mapping[str, Any] | ConfigDict, name: str) -> list[str]:
    names = []
    for key, value in group.items():
        names.append(f"{name}.{key}")
        if isinstance(value, Mapping | ConfigDict):
            names += _dotted(value, f"{name}.{key}")
    return names


def _parse(text: str, present: Any, name: str) -> Any:
    """Reads ``text`` as the type of the value it replaces."""
    if text == "null":
        return None
    if present is None:
        return _wrap(_literal(text))
    if isinstance(present, bool):
        if text.lower() in ("true", "false", "1", "0"):
            return text.lower() in ("true", "1")
        raise _mismatch("true or false", text, name)
    if isinstance(present, int):
        return _integer(text, name)
    if isinstance(present, float):
        try:
            return float(text)
        except ValueError:
            raise _mismatch("float", text, name) from None
    if isinstance(present, list | tuple):
        return _sequence(text, present, name)
    if isinstance(present, Mapping | ConfigDict):
        value = _literal(text)
        if not isinstance(value, dict):
            keys = ", ".join(map(str, present)) or "none"
            raise UserError(f"--{name}={text}: {name} is a group of keys ({keys}); set one, as in --{name}.KEY=VALUE")
        return _wrap(value)
    return text


def _integer(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)  # 1e6
        if number == int(number):
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise _mismatch("int", text, name)


def _sequence(text: str, present: list[Any] | tuple[Any, ...], name: str) -> Any:
    """A list: JSON or Python, or entries between commas; entries take the type that all present ones share."""
    value = _literal(text)
    if not isinstance(value, list | tuple):
        if text.lstrip().startswith(("[", "(", "{")):
            raise _mismatch("a list, as in [1, 2]", text, name)
        value = [_literal(entry.strip()) for entry in text.split(",")] if text.strip() else []
    kinds = {type(entry) for entry in present}
    if len(kinds) == 1 and kinds <= {bool, int, float, str}:
        value = [
            _parse(entry if isinstance(entry, str) else json.dumps(entry), present[0], f"{name}[{i}]")
            for i, entry in enumerate(value)
        ]
    return type(present)(_wrap(entry) for entry in value)


def _literal(text: str) -> Any:
    """JSON, else a Python literal, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _wrap(value: Any) -> Any:
    return _OpenGroup(value) if isinstance(value, dict) else value


def _show(value: Any) -> str:
    return "a group of keys" if isinstance(value, Mapping | ConfigDict) else repr(value)


def _mismatch(wanted: str, text: str, name: str) -> UserError:
    return UserError(f"--{name}={text}: expected {wanted}, got {text!r}")
