"""The first minutes: trains `configs/lm/quickstart.py`, samples from its checkpoint, answers a batch, reports."""

import signal
import sys
from pathlib import Path

import app
from absl import flags

_USAGE = """
Trains a small language model on this machine, then lets it write and answer a batch. Ctrl-C saves; the same command
goes on.

  python scripts/quickstart.py --workdir=runs/quickstart
"""

_PROMPTS = ("def main(", "class Queue:\n    ", "import os\n")
_CONFIG = Path(__file__).resolve().parents[1] / "configs/lm/quickstart.py"

if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/quickstart", "folder of the run")


def main() -> None:
    """Trains, samples, reports, answers a batch."""
    import config_flag
    from rich.console import Console

    from ml.config import build
    from ml.serve.batch.demonstration import answer_shared_prefix
    from ml.train.config import ExperimentConfig
    from ml.train.loop import train
    from ml.train.reporting import print_report
    from ml.train.summary import summarize

    config = build(ExperimentConfig, config_flag.load_file(str(_CONFIG)).to_dict())
    result = train(config, flags.FLAGS.workdir)
    if result.interrupted:
        print(f"saved at step {result.step}; `make quickstart` goes on", file=sys.stderr)
        sys.exit(0 if result.interrupted == signal.SIGTERM else 130)
    samples = result.workdir.path / "samples.txt"
    texts = write_samples(result.workdir.path)
    samples.write_text("\n\n".join(texts) + "\n")
    print_report(summarize(result, samples=str(samples), sample=texts[0]), Console())
    print(f"\n{answer_shared_prefix(result.workdir.path)}")
    print(f'\nWrite more:  .venv/bin/python scripts/generate.py --model={flags.FLAGS.workdir} --prompt="def "')


def write_samples(workdir: Path, max_tokens: int = 96) -> list[str]:
    """Continues a few prompts with the newest checkpoint in ``workdir``; returns prompt and completion of each."""
    from ml.checkpoint.pretrained import load_model
    from ml.data import Tokenizer
    from ml.serve import Engine, EngineConfig, SamplingParams

    config, params, _ = load_model(workdir)
    tokenizer = Tokenizer.load(workdir)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in _PROMPTS]
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.7, top_p=0.9, seed=0)
    settings = EngineConfig.for_job([len(prompt) + max_tokens for prompt in prompts], config.max_length)
    completions = Engine(config, params, settings, stop_ids=[tokenizer.eos_id]).generate(prompts, sampling)
    return [prompt + tokenizer.decode(c.tokens) for prompt, (c,) in zip(_PROMPTS, completions, strict=True)]


if __name__ == "__main__":
    app.run(main, usage=_USAGE)
