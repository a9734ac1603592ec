"""Batches with a glimpse of the next: the same ones as without it, also after a restart."""

import itertools

import numpy as np
import pytest

from ml.data import ImageDataConfig, Lookahead, make_loader, prepare


@pytest.fixture(scope="module")
def prepared():
    return prepare(ImageDataConfig(source="digits"), "")


def loader(prepared):
    return make_loader(prepared, global_batch_size=8, seed=3)


def test_each_batch_sees_the_next_and_a_run_goes_on_where_it_was(prepared):
    plain = list(itertools.islice(loader(prepared), 7))
    ahead = Lookahead(loader(prepared), ("images", "targets"))
    start = ahead.get_state()
    found = list(itertools.islice(ahead, 3))
    state = ahead.get_state()
    ahead.close()
    again = Lookahead(loader(prepared), ("images", "targets"))
    again.set_state(state)
    found += list(itertools.islice(again, 3))
    for number, batch in enumerate(found):
        for name, array in plain[number].items():
            np.testing.assert_array_equal(batch[name], array)
        np.testing.assert_array_equal(batch["next_images"], plain[number + 1]["images"])
        np.testing.assert_array_equal(batch["next_targets"], plain[number + 1]["targets"])
        assert set(batch) == {*plain[0], "next_images", "next_targets"}
    again.set_state(start)
    np.testing.assert_array_equal(next(again)["images"], plain[0]["images"])
    again.close()
