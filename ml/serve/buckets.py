"""The few shapes that steps are rounded up to."""

import bisect
from collections.abc import Iterator, Sequence


def ladder(low: int, high: int, factor: int) -> tuple[int, ...]:
    """``low``, ``low * factor`` and so on up to ``high``, which is the last whatever it is."""
    steps = []
    while low < high:
        steps.append(low)
        low *= factor
    return (*steps, high)


def fit(sizes: Sequence[int], size: int) -> int:
    """The smallest of ``sizes``, which rise, that holds ``size``."""
    return sizes[bisect.bisect_left(sizes, size)]


class Buckets:
    """Numbers of rows and tokens that programs are compiled for.

    Rows of a decode step are powers of two: each row costs. Where prompts are fed too, rows are few beside tokens, so
    that powers of four do; tokens are powers of two.
    """

    def __init__(self, max_running: int, token_budget: int):
        self.decode_rows = ladder(1, max_running, 2)
        self.rows = ladder(4, max_running, 4)
        self.tokens = ladder(16, token_budget, 2)

    def shape(self, rows: int, fed: int, decode: bool) -> tuple[int, int | None]:
        """Rows and tokens of the program for a step; no number of tokens: one per row."""
        return (fit(self.decode_rows, rows), None) if decode else (fit(self.rows, rows), fit(self.tokens, fed))

    def above(self, rows: int, decode: bool) -> Iterator[int]:
        """Numbers of rows from ``rows`` on, one of them."""
        sizes = self.decode_rows if decode else self.rows
        return (size for size in sizes if size >= rows)

    def shapes(self) -> Iterator[tuple[int, int | None]]:
        """All that `shape` can say."""
        for rows in self.decode_rows:
            yield rows, None
        fewest = 1
        for rows in self.rows:
            yield from ((rows, tokens) for tokens in self.tokens if tokens >= fewest)
            fewest = rows + 1
