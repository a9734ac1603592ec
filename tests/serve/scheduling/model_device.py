"""A device that computes nothing but knows what every cell of the cache must hold."""

import functools
import zlib

from ml.serve.scheduling.request import Request
from ml.serve.scheduling.step import Step

VOCABULARY = 5


@functools.lru_cache(maxsize=4096)
def reference(request: Request, index: int) -> tuple[list[int], list[int]]:
    """All tokens of a sample, as if it ran alone and never met a stop token, and what each position's cell must hold.

    A cell stands for all tokens up to its own, as keys and values of upper layers do.
    """
    tokens, cells = list(request.tokens), []
    state = zlib.crc32(request.salt.encode())  # unlike a hash of a string, the same in each process
    for position in range(len(tokens) + request.max_tokens - 1):
        state = hash((state, tokens[position]))
        cells.append(state)
        if position + 1 == len(tokens):
            tokens.append(hash((state, index)) % VOCABULARY)
    return tokens, cells


def answer(request: Request, index: int) -> list[int]:
    """What the sample must yield: drawn tokens up to a stop token."""
    drawn = reference(request, index)[0][len(request.tokens) :]
    stop = next((i for i, token in enumerate(drawn) if token in request.stop_ids), len(drawn) - 1)
    return drawn[: stop + 1]


class ModelDevice:
    """Runs steps; every token that a sequence attends to must be the right one at the right position.

    Rows see what earlier steps wrote and what they write themselves, nothing else of the same step.
    """

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.cells: dict[tuple[int, int], int] = {}
        self.last: dict[int, int] = {}

    def run(self, step: Step) -> list[list[int]]:
        """Returns the drawn tokens of each row."""
        self._copy(step)
        written: dict[tuple[int, int], int] = {}
        results, last = [], {}
        for row in step.rows:
            tokens, cells = reference(row.sequence.request, row.sequence.index)
            table = row.table
            for position in range(row.start):
                found = self.cells.get((table[position // self.page_size], position % self.page_size))
                assert found == cells[position], f"{row.sequence} reads a wrong token at {position}"
            fed = list(row.tokens) or [self.last[row.slot]]
            drawn: list[int] = []
            position = row.start
            guesses = fed[len(fed) - row.drafts :]
            fed = fed[: len(fed) - row.drafts]
            for feed in [fed, *([None] * (row.samples - 1))]:
                for token in [drawn[-1]] if feed is None else feed:
                    assert token == tokens[position], f"{row.sequence} is fed a wrong token at {position}"
                    cell = (table[position // self.page_size], position % self.page_size)
                    assert cell not in written, f"two sequences write page {cell[0]}"
                    written[cell] = cells[position]
                    position += 1
                if row.samples:
                    assert row.number + len(drawn) == position - len(row.sequence.request.tokens)
                    drawn.append(tokens[position])
            if drawn:
                last[row.slot] = drawn[-1]
            right = True
            for guess in guesses:
                right = right and guess == tokens[position]
                cell = (table[position // self.page_size], position % self.page_size)
                assert cell not in written, f"two sequences write page {cell[0]}"
                written[cell] = cells[position] if right else hash((cells[position], guess, -1))
                position += 1
                drawn.append(tokens[position] if right else guess)
                last[row.slot] = -1  # nobody knows here how many were right
            results.append(drawn)
        self.cells |= written
        self.last |= last
        return results

    def holds(self, page: int, tokens: list[int], salt: str) -> bool:
        """Whether a page holds the last tokens of ``tokens``, which end where it does."""
        state, states = zlib.crc32(salt.encode()), []
        for token in tokens:
            state = hash((state, token))
            states.append(state)
        found = [self.cells.get((page, i)) for i in range(self.page_size)]
        return found == states[-self.page_size :]

    def _copy(self, step: Step) -> None:
        sources, targets = {a for a, _ in step.copies}, [b for _, b in step.copies]
        assert len(set(targets)) == len(targets) and not sources & set(targets), "copies depend on their order"
        for source, target in step.copies:
            for i in range(self.page_size):
                self.cells.pop((target, i), None)
                if (source, i) in self.cells:
                    self.cells[target, i] = self.cells[source, i]
