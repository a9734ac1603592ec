"""Times programs in turns: JAX functions many times over inside one compiled loop, others by calling them."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

# Seconds of one measurement: long against the start of a program and the clock's grain.
TURN_SECONDS = {"cpu": 0.15, "gpu": 0.04, "tpu": 0.04}


@dataclasses.dataclass(frozen=True)
class Program:
    """One way to compute a case.

    Attributes:
      name: ``ours/...`` or a peer's.
      function: of arrays, pure; or, with ``framework`` torch, of tensors.
      sets: arguments to call it with, one after the other: together larger than the chip's cache.
      framework: ``jax`` or ``torch``.
    """

    name: str
    function: Callable[..., Any]
    sets: Sequence[tuple]
    framework: str = "jax"


class Timer:
    """A program made ready: compiled, warm, and with a number of calls that takes about a turn."""

    def __init__(self, program: Program, turn_seconds: float):
        self.name = program.name
        self._calls = len(program.sets)
        self._run = _torch_loop(program) if program.framework == "torch" else _jax_loop(program)
        self._repeats = 1
        self._run(1)
        first = self.turn()
        self._repeats = max(1, round(turn_seconds / (first * self._calls)))

    def turn(self) -> float:
        """Seconds of one call, in the mean over a turn."""
        begin = time.perf_counter()
        self._run(self._repeats)
        return (time.perf_counter() - begin) / (self._repeats * self._calls)


def interleaved(timers: Sequence[Timer], rounds: int) -> dict[str, dict[str, Any]]:
    """Gives each timer a turn in each round; returns medians and quartiles in seconds."""
    times: dict[str, list[float]] = {timer.name: [] for timer in timers}
    for _ in range(rounds):
        for timer in timers:
            times[timer.name].append(timer.turn())
    results = {}
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values * 3)
        results[name] = {"seconds": statistics.median(values), "quartiles": [low, high]}
    return results


def _jax_loop(program: Program) -> Callable[[int], None]:
    import jax
    import jax.numpy as jnp

    @jax.jit
    def loop(sets: Any, repeats: Any) -> Any:
        def once(_: Any, total: Any) -> Any:
            for arguments in sets:
                # Each call waits for the one before and is made again in every pass; its whole result is wanted.
                arguments, total = jax.lax.optimization_barrier((arguments, total))
                result = jax.lax.optimization_barrier(program.function(*arguments))
                total = total + sum(leaf.ravel()[0].astype(jnp.float32) for leaf in jax.tree.leaves(result))
            return total

        return jax.lax.fori_loop(0, repeats, once, jnp.float32(0))

    compiled: Any = None
    sets = list(program.sets)

    def run(repeats: int) -> None:
        nonlocal compiled
        count = jnp.int32(repeats)
        if compiled is None:
            compiled = loop.lower(sets, count).compile()
        jax.block_until_ready(compiled(sets, count))

    return run


def _torch_loop(program: Program) -> Callable[[int], None]:
    import torch

    def run(repeats: int) -> None:
        with torch.inference_mode(not _needs_gradient(program.sets)):
            for _ in range(repeats):
                for arguments in program.sets:
                    program.function(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def _needs_gradient(sets: Sequence[tuple]) -> bool:
    return any(getattr(argument, "requires_grad", False) for arguments in sets for argument in arguments)
