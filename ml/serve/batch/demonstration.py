"""A first offline job for a fresh model: requests that begin alike, and what sharing that beginning saved."""

import io
import json
import os
from pathlib import Path

import rich.console

from ml.serve.batch.job import Job
from ml.serve.engine import Engine
from ml.serve.engine_config import EngineConfig
from ml.serve.text.served_model import ServedModel, serving_dtype

# What all requests begin with, as few-shot examples or instructions would be.
_PREFIX = '''class Stack:
    """Holds items; the last one in is the first one out."""

    def __init__(self, items=()):
        """Begins with ``items``, the last of them on top."""
        self._items = list(items)

    def __len__(self):
        return len(self._items)

    def push(self, item):
        """Puts an item on top."""
        self._items.append(item)

    def pop(self):
        """Takes the top item away and returns it."""
        if not self._items:
            raise IndexError("pop from an empty stack")
        return self._items.pop()

'''
_METHODS = ("peek", "clear", "copy", "extend", "reverse", "index", "count", "remove", "sort", "insert", "swap", "close")
_MAX_TOKENS = 24


def answer_shared_prefix(folder: str | os.PathLike[str], samples: int = 4) -> str:
    """Answers a small batch, ``batch.jsonl`` to ``answers.jsonl`` in a folder, with the folder's own model.

    Args:
      folder: a work directory with a checkpoint.
      samples: texts per request.

    Returns:
      A line that says how many tokens the prompts had, and how many of them were not computed again.
    """
    folder = Path(folder)
    source, output = folder / "batch.jsonl", folder / "answers.jsonl"
    model = ServedModel.load(folder)
    prompts = {method: f"{_PREFIX}    def {method}(self" for method in _METHODS}
    asked = {"max_tokens": _MAX_TOKENS, "temperature": 0.7, "n": samples}
    lines = [
        {"custom_id": method, "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt, **asked}}
        for method, prompt in prompts.items()
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    output.unlink(missing_ok=True)  # of an earlier model
    longest = max(len(model.encode(prompt)) for prompt in prompts.values()) + _MAX_TOKENS
    settings = EngineConfig.for_job(
        [longest] * len(lines) * samples, model.config.max_length, dtype=serving_dtype(), schedule="planned"
    )
    engine = Engine(model.config, model.params, settings, stop_ids=model.stop_ids)
    result = Job(model, source, output).run(engine, console=rich.console.Console(file=io.StringIO()))
    if result.interrupted:
        raise KeyboardInterrupt
    statistics = result.statistics
    return (
        f"{len(lines)} requests with one prefix, {samples} texts each, in {result.seconds:.1f} s: of "
        f"{statistics.prompt:,} prompt tokens {statistics.cached:,} were shared instead of computed "
        f"({statistics.cached / statistics.prompt:.0%}); {output}"
    )
