"""Measures how long users wait for the first token, and between two, while requests come at random times."""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import app
import machine
import numpy as np
import result_file
from absl import flags

_USAGE = """
Sends requests to the engine at the times of a Poisson process, with and without chunked prefill, taking turns, and
writes the times to the first token and between tokens as JSON.

  python scripts/bench_latency.py
  python scripts/bench_latency.py --loads=0.9 --requests=200
"""

# A prompt's chunk beside the running decodes (Sarathi-Serve), or the whole of the longest prompt in one step.
_WAYS = {"chunked": 64, "whole_prompts": 1024}
_ENGINE = {"max_running": 32, "cache_tokens": 2**15, "decode_steps": 1, "share": "never"}
_NEW_TOKENS = 48


def define_flags() -> None:
    """Defines the script's flags."""
    flags.DEFINE_integer("requests", 80, "requests of each turn", lower_bound=2)
    flags.DEFINE_integer("rounds", 5, "turns of each", lower_bound=1)
    flags.DEFINE_list("loads", ["0.5", "0.8"], "arrivals, as parts of the requests per second that a full engine does")
    flags.DEFINE_boolean("allow_load", False, "measure although others use the machine; the result says so")
    flags.DEFINE_string("output", "docs/results/cpu", "folder to write bench_latency.json to")


def main() -> None:
    """Measures, prints a table, writes JSON."""
    import jax

    args = flags.FLAGS
    loads = _loads(args.loads)
    busy = machine.busy_share()
    if not args.allow_load:
        machine.refuse(busy)
    engines = {way: _engine(budget) for way, budget in _WAYS.items()}
    capacity = _capacity(engines["chunked"], args.requests)
    print(f"capacity: {capacity:.2f} requests/s", flush=True)
    results: dict[str, Any] = {}
    for load in loads:
        turns: dict[str, list[dict[str, list[float]]]] = {way: [] for way in engines}
        for turn in range(args.rounds):
            for way, engine in engines.items():
                turns[way].append(_serve(engine, args.requests, load * capacity, turn))
                print(f"load {load}, turn {turn + 1}: {way}", flush=True)
        results[f"{load}"] = {way: _summary(each) for way, each in turns.items()}
        for way, summary in results[f"{load}"].items():
            first, between = summary["first_token"], summary["between_tokens"]
            print(
                f"load {load} {way:<14} first token {first['p50'] * 1e3:6.0f} ms, p99 {first['p99'] * 1e3:6.0f} ms;"
                f" between tokens {between['p50'] * 1e3:5.1f} ms, p99 {between['p99'] * 1e3:6.1f} ms"
            )
    document = {
        "command": "python scripts/bench_latency.py " + " ".join(sys.argv[1:]),
        "device": machine.cpu(),
        "version": f"jax {jax.__version__}",
        "busy_before": round(busy, 3),
        "settings": {"requests": args.requests, "rounds": args.rounds, "new_tokens": _NEW_TOKENS, **_ENGINE},
        "token_budget": _WAYS,
        "capacity_requests_per_second": capacity,
        "results": results,
    }
    path = Path(args.output) / "bench_latency.json"
    result_file.write(path, document)
    print(f"written to {path}")


def _loads(given: list[str]) -> list[float]:
    from ml.errors import UserError

    try:
        loads = [float(each) for each in given]
    except ValueError:
        loads = []
    if not loads or not all(0 < load < 1 for load in loads):
        raise UserError(f"--loads={','.join(given)}: at 1 and above queues grow for ever; give numbers between 0 and 1")
    return loads


def _engine(budget: int) -> Any:
    import jax
    from serve_bench.workloads import ARCHITECTURE

    from ml.models import Transformer, TransformerConfig, init_params
    from ml.serve import Engine, EngineConfig, SamplingParams

    fields: Any = ARCHITECTURE
    config = TransformerConfig(**fields)
    params = jax.jit(init_params, static_argnums=0)(Transformer(config), jax.random.key(0))
    engine = Engine(config, params, EngineConfig(token_budget=budget, **_ENGINE))  # type: ignore[arg-type]
    engine.warm_up((SamplingParams(temperature=0.0),))
    return engine


def _prompts(count: int, seed: int) -> list[list[int]]:
    from serve_bench.workloads import ARCHITECTURE

    rng = np.random.default_rng(seed)
    lengths = rng.integers(32, 897, count).tolist()
    return [rng.integers(0, ARCHITECTURE["vocab_size"], length).tolist() for length in lengths]


def _capacity(engine: Any, count: int) -> float:
    """Requests per second of an engine that always has enough to do."""
    from ml.serve import SamplingParams

    begin = time.perf_counter()
    engine.generate(_prompts(count, seed=1000), SamplingParams(max_tokens=_NEW_TOKENS, temperature=0.0))
    return count / (time.perf_counter() - begin)


def _serve(engine: Any, count: int, rate: float, seed: int) -> dict[str, list[float]]:
    """Serves requests as they come; returns all seconds to first tokens, and between tokens."""
    from ml.serve import SamplingParams

    engine.reset()
    prompts = _prompts(count, seed)
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))
    sampling = SamplingParams(max_tokens=_NEW_TOKENS, temperature=0.0)
    latest: dict[str, float] = {}  # when the request last got something; at first, when it came
    first: list[float] = []
    between: list[float] = []
    begun: set[str] = set()
    begin = time.perf_counter()
    added = 0
    while added < count or engine.unfinished:
        now = time.perf_counter() - begin
        if not engine.unfinished and arrivals[added] > now:
            time.sleep(arrivals[added] - now)
            now = time.perf_counter() - begin
        while added < count and arrivals[added] <= now:
            engine.add(prompts[added], sampling, f"{added}")
            latest[f"{added}"] = float(arrivals[added])
            added += 1
        news = engine.step()
        now = time.perf_counter() - begin
        for update, _ in news:
            name = update.sequence.request.id
            if update.tokens:
                (between if name in begun else first).append(now - latest[name])
                begun.add(name)
                latest[name] = now
    assert len(first) == count and len(between) == count * (_NEW_TOKENS - 1)
    return {"first_token": first, "between_tokens": between}


def _summary(turns: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Percentiles in seconds: the median over turns, and of each turn."""
    found: dict[str, Any] = {}
    for name in turns[0]:
        found[name] = {}
        for label, percent in (("p50", 50), ("p90", 90), ("p99", 99), ("max", 100)):
            each = [float(np.percentile(turn[name], percent)) for turn in turns]
            found[name] |= {label: statistics.median(each), f"{label}_of_turns": [round(x, 5) for x in each]}
    return found


if __name__ == "__main__":
    define_flags()
    app.run(main, usage=_USAGE)
