"""What is guessed from n-grams."""

import array

import numpy as np
import pytest

from ml.serve.scheduling import NgramDrafter, Request, Sequence
from ml.serve.scheduling.ngrams import Ngrams


def guess(tokens, most=3, longest=3):
    return Ngrams(longest).propose(array.array("i", tokens), most).tolist()


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], []),
        ([1], []),
        ([1, 2, 3, 4], []),
        ([1, 2, 7, 8, 9, 1, 2], [7, 8, 9]),
        ([1, 2, 7, 8, 9, 3, 2], []),  # one token alone says little
        ([1, 2, 7, 1, 2, 8, 6, 5, 1, 2], [8, 6, 5]),  # what came last
        ([0, 1, 2, 7, 8, 5, 1, 2, 9, 0, 1, 2], [7, 8, 5]),  # a longer n-gram before a later one
        ([3, 1, 2, 1, 2], [1, 2, 1]),  # goes on repeating
        ([5, 5, 5], [5, 5, 5]),
        ([1, 2, 7, 1, 2], [7, 1, 2]),
    ],
)
def test_what_followed_the_last_tokens_before(tokens, expected):
    assert guess(tokens) == expected


def test_the_longest_n_gram_bounds_the_others():
    assert guess([1, 7, 1], longest=1) == [7, 1, 7]
    assert guess([1, 7, 1], longest=2) == []
    assert guess([0, 1, 2, 7, 1, 2, 9, 0, 1, 2], most=1, longest=2) == [9]
    assert guess([0, 1, 2, 7, 1, 2, 9, 0, 1, 2], most=1, longest=3) == [7]


def slow_guess(tokens, most, longest):
    for size in range(longest, min(2, longest) - 1, -1):
        for begin in range(len(tokens) - size - 1, -1, -1):
            if tokens[begin : begin + size] == tokens[-size:]:
                text = tokens[:]
                for position in range(begin + size, begin + size + most):
                    text.append(text[position])
                return text[len(tokens) :]
    return []


@pytest.mark.parametrize("longest", [1, 2, 4])
def test_a_text_that_grows_is_searched_as_a_whole(longest):
    rng = np.random.default_rng(longest)
    for _ in range(40):
        ngrams, tokens = Ngrams(longest), array.array("i")
        while len(tokens) < 60:
            tokens.extend(rng.integers(0, 4, rng.integers(1, 7)).tolist())
            most = int(rng.integers(1, 9))
            assert ngrams.propose(tokens, most).tolist() == slow_guess(tokens.tolist(), most, longest)


def test_each_token_is_looked_at_once():
    class Counted(array.array):
        read = 0

        def __getitem__(self, where):
            Counted.read += 1
            return super().__getitem__(where)

    ngrams, tokens = Ngrams(3), Counted("i", range(1000))
    ngrams.propose(tokens, 4)
    reads = []
    for token in range(20):
        before = Counted.read
        tokens.append(2000 + token)
        ngrams.propose(tokens, 4)
        reads.append(Counted.read - before)
    assert max(reads) <= 4


def test_fewer_guesses_while_they_are_wrong():
    drafter = NgramDrafter(8, 2)
    sequence = Sequence(Request("a", [1, 2] * 8, max_tokens=50))
    widths = []
    for accepted in (8, 5, 1, 0, 0, 0, 1, 2, 4, 8):
        guesses = drafter.propose(sequence, 99)
        widths.append(len(guesses))
        drafter.learn(sequence, len(guesses), accepted)
    assert widths == [8, 8, 6, 3, 1, 1, 1, 2, 4, 8]
    assert len(drafter.propose(sequence, 3)) == 3
    drafter.learn(sequence, 3, 0)
    drafter.forget(sequence)
    assert not drafter._texts
    assert len(drafter.propose(sequence, 99)) == 8
