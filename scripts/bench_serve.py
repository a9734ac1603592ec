"""Measures the serving engine against other ways to do the same job, taking turns."""

import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import app
import machine
import result_file
from absl import flags

_USAGE = """
Runs jobs through this project's engine and through transformers, interleaved, and compares; writes JSON.

  make env-parity    # PyTorch and transformers, in an environment of their own
  python scripts/bench_serve.py --peer=transformers --peer_python=.venv-parity/bin/python
  python scripts/bench_serve.py --job=two_level
"""

_ROOT = Path(__file__).resolve().parents[1]
# Requests by which the peer's best batch is looked for.
_PROBE = 128
_OURS = {
    "shared": {"max_running": 256, "token_budget": 1024, "cache_tokens": 2**15},
    "unshared": {"max_running": 64, "token_budget": 512, "cache_tokens": 2**15},
    # A cache that holds three of the eight outer groups.
    "two_level": {"max_running": 32, "token_budget": 512, "cache_tokens": 6144},
}
# This engine's ways to do the job, and what of its options is another.
_OURS_OF: dict[str, dict[str, dict]] = {
    "shared": {"megabatch": {}, "megabatch/no_shared_attention": {"share": "never"}},
    "unshared": {"megabatch": {}},
    "two_level": {f"megabatch/{order}": {"schedule": order} for order in ("planned", "prefix", "fifo")},
}
_WAYS = {"shared": ("padded", "prefix_once", "generate_batch"), "unshared": ("padded", "generate_batch")}


def define_flags() -> None:
    """Defines the script's flags."""
    flags.DEFINE_enum(
        "job", "shared", list(_OURS), "shared, unshared: against the peer; two_level: planned against fifo"
    )
    flags.DEFINE_enum("peer", None, ["transformers"], "whom to compare with; none: this engine alone")
    flags.DEFINE_list("ways", None, "the peer's ways to do the job; none: all of padded, prefix_once, generate_batch")
    flags.DEFINE_list("batches", ["16", "32", "64", "128"], "the peer's batch sizes, of which the best is taken")
    flags.DEFINE_string("peer_python", ".venv-parity/bin/python", "interpreter that has torch and transformers")
    flags.DEFINE_integer("requests", 256, "prompts of the job", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "turns of each", lower_bound=1)
    flags.DEFINE_integer("threads", 2, "threads (and cores) of each side", lower_bound=1)
    flags.DEFINE_boolean("allow_load", False, "measure although others use the machine; the result says so")
    flags.DEFINE_string("output", "docs/results/cpu", "folder to write bench_serve_JOB.json to")


def main() -> None:
    """Measures a job, prints a line for each way to do it, writes JSON."""
    from ml.errors import UserError

    args = flags.FLAGS
    if unknown := set(args.ways or ()) - set(_WAYS.get(args.job, ())):
        raise UserError(f"--ways={unknown.pop()}: for this job choose from {', '.join(_WAYS.get(args.job, ('none',)))}")
    peer_python = (_ROOT / args.peer_python).absolute()
    if args.peer and not peer_python.exists():
        raise UserError(f"--peer_python={args.peer_python}: no such interpreter; `make env-parity` makes it")
    busy = machine.busy_share()
    if not args.allow_load:
        machine.refuse(busy)
    with tempfile.TemporaryDirectory() as folder:
        model = _write_model(Path(folder))
        # Each engine has a process of its own: its programs take many of the memory maps that Linux grants to one.
        sides = {name: _side("megabatch", sys.executable, model) for name in _OURS_OF[args.job]}
        if args.peer:
            sides[args.peer] = _side(args.peer, str(peer_python), model)
        try:
            contestants, probe = _contestants(args, sides)
            results = _turns(args, sides, contestants)
        finally:
            for side in sides.values():
                side.close()
    first = next(iter(results))
    document = {
        "command": "python scripts/bench_serve.py " + " ".join(sys.argv[1:]),
        "device": f"{args.threads} threads of {machine.cpu()}",
        "settings": {"job": args.job, "requests": args.requests, "rounds": args.rounds, "dtype": "float32"},
        "busy_before": round(busy, 3),
        "peer_batches_tried": probe,
        "results": results,
    }
    path = Path(args.output) / f"bench_serve_{args.job}.json"
    result_file.write(path, document)
    for name, result in results.items():
        if "error" in result:
            print(f"{name:<34} {result['error'][:100]}")
            continue
        ratio = result["seconds"] / results[first]["seconds"]
        print(
            f"{name:<34}{result['seconds']:8.2f} s{result['tokens_per_second']:9.0f} new tokens/s"
            f"{ratio:8.2f} x the time of {first}, agreement {result['agreement']:.3f}"
        )
    print(f"written to {path}")


def _side(name: str, python: str, model: Path) -> Any:
    from serve_bench.sides import Side

    return Side(name, python, model, flags.FLAGS.threads)


def _contestants(args: Any, sides: dict[str, Any]) -> tuple[dict[str, tuple[str, dict]], dict[str, Any]]:
    """Who does the job, and with which options: of the peer's batch sizes the best, by a part of the job."""
    contestants = {name: (name, _OURS[args.job] | other) for name, other in _OURS_OF[args.job].items()}
    probe: dict[str, Any] = {}
    for way in args.ways or _WAYS[args.job] if args.peer else ():
        tried: dict[int, Any] = {}
        batches = [int(batch) for batch in args.batches] if way != "generate_batch" else [0]
        for batch in batches if len(batches) > 1 else ():
            answer = sides[args.peer].run(args.job, min(_PROBE, args.requests), way=way, batch=batch)
            tried[batch] = answer.get("error", answer["seconds"])
            print(f"{args.peer}/{way}, batches of {batch}: {tried[batch]}", flush=True)
        probe[way] = tried
        times = {batch: seconds for batch, seconds in tried.items() if not isinstance(seconds, str)}
        batch = min(times, key=times.__getitem__) if times else batches[0]
        contestants[f"{args.peer}/{way}"] = (args.peer, {"way": way, "batch": batch})
    return contestants, probe


def _turns(args: Any, sides: dict[str, Any], contestants: dict[str, tuple[str, dict]]) -> dict[str, dict[str, Any]]:
    answers: dict[str, list[dict]] = {name: [] for name in contestants}
    for side, options in contestants.values():
        if side != args.peer:
            sides[side].run(args.job, args.requests, **options)  # what the warm-up left to compile
    for turn in range(args.rounds):
        for name, (side, options) in contestants.items():
            if any("error" in answer for answer in answers[name]):
                continue
            answers[name].append(sides[side].run(args.job, args.requests, **options))
            print(f"turn {turn + 1}: {name} {answers[name][-1]['seconds']:.2f} s", flush=True)
    reference = next(iter(answers.values()))[0].get("tokens", [])
    return {name: _summary(options, answers[name], reference) for name, (_, options) in contestants.items()}


def _summary(options: dict, answers: list[dict], reference: list[list[int]]) -> dict[str, Any]:
    for answer in answers:
        if "error" in answer:
            return {"options": options, "error": answer["error"]}
    seconds = [answer["seconds"] for answer in answers]
    tokens = answers[0]["tokens"]
    rest = {key: value for key, value in answers[-1].items() if key not in ("seconds", "tokens")}
    return {
        "options": options,
        "seconds": statistics.median(seconds),
        "all_seconds": [round(each, 3) for each in seconds],
        "tokens_per_second": sum(map(len, tokens)) / statistics.median(seconds),
        "agreement": statistics.fmean(_agreement(a, b) for a, b in zip(tokens, reference, strict=True)),
        **rest,
    }


def _agreement(tokens: list[int], reference: list[int]) -> float:
    """The share of tokens before the first that differs."""
    pairs = zip(tokens, reference, strict=False)
    shorter, longer = sorted((len(tokens), len(reference)))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter) / longer


def _write_model(folder: Path) -> Path:
    """A Llama with random weights, as a Hugging Face folder."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    from serve_bench.workloads import ARCHITECTURE

    from ml.models import Transformer, TransformerConfig, init_params
    from ml.models.huggingface import save_pretrained

    fields: Any = ARCHITECTURE
    config = TransformerConfig(**fields)
    params = jax.jit(init_params, static_argnums=0)(Transformer(config), jax.random.key(0))
    save_pretrained(folder / "model", config, params, None)
    return folder / "model"


if __name__ == "__main__":
    define_flags()
    app.run(main, usage=_USAGE)
