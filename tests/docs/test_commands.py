"""Every command in README and guides can be typed: script, flags, config files, keys, values, targets, extras exist."""

import ast
import re
import sys

import pytest
from pages import PAGES, ROOT, commands, fences, name_of, prose

from ml.config import build
from ml.models import TransformerConfig
from ml.plan import topology
from ml.studies.registry import studies
from ml.train.base import base
from ml.train.config import ExperimentConfig

sys.path.insert(0, str(ROOT / "scripts"))
import config_flag

COMMANDS = [command for page in PAGES for command in commands(page)]
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
# Those whose file wants a folder that is not there.
WANT_A_FOLDER = ("configs/lm/finetune.py", "configs/bert/classify.py")
# Those that take a folder without looking into it.
TAKE_A_FOLDER = ("configs/resnet/imagenet", "configs/bert/large", "configs/bert/tiny_cpu")
TINY = TransformerConfig(
    vocab_size=8, num_layers=1, embed_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8, max_length=8192
)


def flags_of(script, seen=None):
    """Names of the flags that a script defines, itself or through the modules beside it."""
    seen = set() if seen is None else seen
    if script in seen:
        return set()
    seen.add(script)
    names = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if node.func.attr.startswith("DEFINE_") and isinstance(first, str):
                names.add(first)
            if node.func.attr == "add_argument" and isinstance(first, str):
                names.add(first.lstrip("-"))
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for module in modules:
            for folder in (script.parent, ROOT / "scripts"):
                if (beside := folder / f"{module}.py").exists():
                    names |= flags_of(beside, seen)
    return names | ({"config"} if (ROOT / "scripts/config_flag.py") in seen else set())


def test_there_are_commands():
    assert len(COMMANDS) > 60
    assert {"train.py", "generate.py", "serve.py"} <= {command.words[0].split("/")[-1] for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_can_be_typed(command):
    first, *words = command.words
    if first == "make":
        assert words[0] in TARGETS
        return
    script = ROOT / first
    assert script.exists()
    known, overrides, given = flags_of(script), [], {}
    for word in words:
        if word == "...":
            continue
        if not word.startswith("--"):
            assert "takes_words=True" in script.read_text(), word
            continue
        name, _, value = word.removeprefix("--").partition("=")
        given[name] = value
        if name.startswith("config."):
            overrides.append((name, value))
            assert "config" in known
        else:
            assert name in known or name.removeprefix("no") in known, f"{first} has no flag {name}"
    if "config" in given:
        check_config(given["config"], overrides)
    if "topology" in given and "launch" not in first:
        topology.parse(given["topology"])
    if "study" in given and given["study"] != "NAME":
        assert given["study"] in studies()


def check_config(spec, overrides):
    """The file exists, and takes the overrides, of the right types and values."""
    path = spec.partition(".py")[0] + ".py"
    if path == "FILE.py":
        return
    assert (ROOT / path).is_file(), path
    if path in WANT_A_FOLDER:
        assert spec != path
        config = base(TINY)
    else:
        folder = spec.removeprefix(path) if path.startswith(TAKE_A_FOLDER) else ""
        config = config_flag.load_file(f"{ROOT / path}{folder}")
    with config.unlocked():
        for name, value in overrides:
            if not value.isupper():
                config_flag.override(config, name, value)
    build(ExperimentConfig, config.to_dict())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_keys_in_prose_exist(page):
    """What stands in code spans as `train.steps=100` or `--config.mesh.fsdp` is a key, and the value is one of its."""
    groups = "model|data|optimizer|schedule|train|eval|checkpoint|mesh|health"
    config = base(TINY)
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        for word in span.split():
            match = re.fullmatch(rf"(?:--)?(?:config\.)?((?:{groups})\.[a-z_.\[\]0-9]+)(?:=(\S+))?", word)
            if not match or (ROOT / match[1].replace(".py", "")).suffix or match[1].startswith(("model.apply",)):
                continue
            key, value = match[1], match[2]
            if key.startswith("model.moe.") or ".options." in key or key.endswith((".py", ".jsonl", ".json")):
                continue
            with config.unlocked():
                if value is None or value.isupper():
                    group = config
                    for part in re.sub(r"\[\d+\]", "", key).split(".")[:-1]:
                        group = group[part] if not isinstance(group[part], list | tuple) else group[part][0]
                    assert key.rpartition(".")[2] in group, f"{word}: no such key"
                else:
                    changed = config.copy_and_resolve_references()
                    config_flag.override(changed, f"config.{key}", value)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_extras_exist(page):
    setup = (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2]
    extras = set(re.findall(r"^([a-z][\w-]*) =$", setup, flags=re.MULTILINE))
    for names in re.findall(r"\.\[([\w,-]+)\]", page.read_text()):
        assert set(names.split(",")) <= extras, names


def test_every_script_and_target_is_told_of():
    """A script or a target that no page names is one that nobody finds."""
    text = "\n".join(page.read_text() for page in PAGES)
    helpers = {
        "app.py",
        "config_flag.py",
        "compiled.py",
        "machine.py",
        "result_file.py",
        "setup_env.py",
        "job.py",
        "tpu_types.py",
    }
    for script in [*(ROOT / "scripts").glob("*.py"), *(ROOT / "scripts/launch").glob("*.py")]:
        names = {script.name, script.stem, f"make {script.stem.replace('_', '-')}"}
        assert script.name in helpers or any(name in text for name in names), script
    for target in TARGETS - {"env-parity", "env-cuda", "gpu-wheels", "lint", "typecheck"}:
        assert f"make {target}" in text, target


def test_python_in_pages_parses():
    for page in PAGES:
        for code in fences(page, "python"):
            ast.parse(code)
