"""Programs that are compiled once, most of them before the first request."""

import concurrent.futures
import os
import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any


class Programs:
    """Compiled programs by what they are compiled for; one that is missing is compiled when it is needed.

    Attributes:
      compilations: programs compiled when they were needed, since the last warm-up: each kept someone waiting.
    """

    def __init__(self, compile_program: Callable[[Any], Any]):
        """``compile_program`` compiles the program of a key; several threads may call it at once."""
        self._compile = compile_program
        self._programs: dict[Hashable, Any] = {}
        self._lock = threading.Lock()
        self.compilations = 0

    def __len__(self) -> int:
        return len(self._programs)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._programs

    def __getitem__(self, key: Hashable) -> Any:
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._compile(key)
            self.compilations += 1
        return program

    def warm_up(self, keys: Iterable[Hashable], threads: int | None = None) -> int:
        """Compiles those that are missing, several at a time; returns how many, and counts compilations anew.

        Args:
          keys: of the programs.
          threads: ``None``: as many as there are processors, at most 8.
        """
        missing = [key for key in dict.fromkeys(keys) if key not in self._programs]
        threads = min(8, os.cpu_count() or 1) if threads is None else threads

        def make(key: Hashable) -> None:
            program = self._compile(key)
            with self._lock:
                self._programs[key] = program

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(make, missing))
        self.compilations = 0
        return len(missing)
