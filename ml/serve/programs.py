"""Programs that are compiled once, most of them before the first request."""

import collections
import concurrent.futures
import gc
import os
import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from absl import logging


class Programs:
    """Compiled programs by what they are compiled for; one that is missing is compiled when it is needed.

    Where there is no room for another, those that were not used for longest make way.

    Attributes:
      compilations: programs compiled when they were needed, since the last warm-up: each kept someone waiting.
    """

    def __init__(
        self,
        compile_program: Callable[[Any], Any],
        full: Callable[[], bool] = lambda: False,
        forget: Callable[[], None] = lambda: None,
    ):
        """Has none yet.

        Args:
          compile_program: compiles the program of a key; several threads may call it at once.
          full: whether there is no room for more than those that there are.
          forget: makes whoever else keeps programs let go of them.
        """
        self._compile, self._full, self._forget = compile_program, full, forget
        self._programs: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()  # the last used last
        self._lock = threading.Lock()
        self.compilations = 0

    def __len__(self) -> int:
        return len(self._programs)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._programs

    def __getitem__(self, key: Hashable) -> Any:
        program = self._programs.get(key)
        if program is None:
            self._make_room()
            program = self._programs[key] = self._compile(key)
            self.compilations += 1
        self._programs.move_to_end(key)
        return program

    def _make_room(self) -> None:
        while self._programs and self._full():
            dropped = -(-len(self._programs) // 4)
            for _ in range(dropped):
                self._programs.popitem(last=False)
            self._forget()
            gc.collect()
            logging.warning("no room for another program: dropped the %d that were not used for longest", dropped)

    def warm_up(self, keys: Iterable[Hashable], threads: int | None = None) -> int:
        """Compiles those that are missing, several at a time, while there is room; counts compilations anew.

        Args:
          keys: of the programs.
          threads: ``None``: as many as there are processors, at most 8.

        Returns:
          How many were compiled.
        """
        missing = [key for key in dict.fromkeys(keys) if key not in self._programs]
        threads = min(8, os.cpu_count() or 1) if threads is None else threads

        def make(key: Hashable) -> bool:
            if self._full():
                return False
            program = self._compile(key)
            with self._lock:
                self._programs[key] = program
            return True

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            made = sum(pool.map(make, missing))
        if made < len(missing):
            left = len(missing) - made
            logging.warning(
                "room for %d of %d programs: the other %d are compiled when needed", made, len(missing), left
            )
        self.compilations = 0
        return made
