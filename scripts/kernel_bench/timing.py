"""Times programs in turns.

A JAX function is called once for each set of arguments inside one compiled program, all of whose results are kept: so a
short call is not a program's start, and no work can be left out or done once for all.
"""

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
        self._run = _torch_calls(program) if program.framework == "torch" else _jax_calls(program)
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


def _jax_calls(program: Program) -> Callable[[int], None]:
    import jax

    def once(sets: Any) -> list[Any]:
        results: list[Any] = []
        for arguments in sets:
            if results:  # one after the other
                arguments, results[-1] = jax.lax.optimization_barrier((arguments, results[-1]))
            results.append(program.function(*arguments))
        return results  # whole, or the compiler would leave out what is not wanted

    sets = list(program.sets)
    compiled = jax.jit(once).lower(sets).compile()
    # A CPU would work on several programs at once; for the others they queue up, so that no start is waited for.
    wait = jax.default_backend() == "cpu"

    def run(repeats: int) -> None:
        for _ in range(repeats):
            results = compiled(sets)
            if wait:
                jax.block_until_ready(results)
        jax.block_until_ready(results)

    return run


def _torch_calls(program: Program) -> Callable[[int], None]:
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
