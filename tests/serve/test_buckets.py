import itertools

import pytest

from ml.serve.buckets import Buckets, fit, ladder
from ml.serve.programs import Programs


def test_ladder_ends_at_the_most():
    assert ladder(1, 8, 2) == (1, 2, 4, 8)
    assert ladder(4, 100, 4) == (4, 16, 64, 100)
    assert ladder(16, 10, 2) == (10,)
    assert [fit((4, 16, 100), n) for n in (0, 4, 5, 100)] == [4, 4, 16, 100]


@pytest.mark.parametrize(("max_running", "budget"), [(1, 1), (3, 8), (6, 40), (20, 33)])
def test_every_step_has_a_shape_and_every_shape_is_compiled_ahead(max_running, budget):
    buckets = Buckets(max_running, budget)
    shapes = set(buckets.shapes())
    for rows, fed in itertools.product(range(1, max_running + 1), range(1, budget + 1)):
        if fed >= rows:
            shape = buckets.shape(rows, fed, False)
            assert shape in shapes
            assert shape[0] >= rows and shape[1] >= fed
        assert buckets.shape(rows, fed, True) in shapes
        assert buckets.shape(rows, fed, True)[0] < 2 * rows
        assert list(buckets.above(max_running, True)) == [max_running]


def test_programs_are_few():
    assert len(set(Buckets(64, 512).shapes())) < 30
    assert len(set(Buckets(256, 2048).shapes())) < 50


def test_programs_are_compiled_once_and_counted_after_the_warm_up():
    made = []
    programs = Programs(lambda key: made.append(key) or key.upper())
    assert programs["a"] == "A"
    assert programs.compilations == 1
    assert programs.warm_up(["a", "b", "b"], threads=2) == 1
    assert programs.compilations == 0
    assert [programs["a"], programs["b"], programs["c"]] == ["A", "B", "C"]
    assert (made, programs.compilations, len(programs)) == (["a", "b", "c"], 1, 3)
    assert "b" in programs and "d" not in programs


def test_a_program_that_does_not_compile_ends_the_warm_up():
    def fail(key):
        raise ValueError(key)

    with pytest.raises(ValueError, match="x"):
        Programs(fail).warm_up(["x"])


def test_programs_that_were_not_used_for_longest_make_way():
    room = 4
    programs = Programs(str.upper, lambda: len(programs) >= room)
    for key in "abcd":
        assert programs[key] == key.upper()
    assert programs["a"] == "A"
    assert programs["e"] == "E"
    assert "b" not in programs and all(key in programs for key in "acde")
    assert programs["b"] == "B"
    assert "c" not in programs and all(key in programs for key in "adeb")
    room = 1
    assert programs["x"] == "X"
    assert len(programs) == 1


def test_a_warm_up_ends_where_there_is_no_more_room():
    programs = Programs(str.upper, lambda: len(programs) >= 2)
    assert programs.warm_up("abc", threads=1) == 2
    assert "a" in programs and "b" in programs
    assert programs["c"] == "C"
    assert programs.compilations == 1
