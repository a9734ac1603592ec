"""Records of TensorFlow Datasets, against messages written by the published definitions."""

import pytest
from image_cases import example

from ml.data.images.examples import read_example


@pytest.mark.parametrize("packed", [True, False])
def test_reads_all_kinds_of_features(packed):
    message = example(
        packed, image=b"\x00\xff" * 200, label=7, many=[3, -1, 2**40], ratio=[0.5, -2.0], names=[b"a", b""]
    )
    assert read_example(message) == {
        "image": [b"\x00\xff" * 200],
        "label": [7],
        "many": [3, -1, 2**40],
        "ratio": [0.5, -2.0],
        "names": [b"a", b""],
    }


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_what_is_cut_short_is_named(cut):
    with pytest.raises(ValueError, match=r"not a tf\.train\.Example"):
        read_example(example(image=b"x" * 50, label=7)[:-cut])


def test_other_bytes_are_none():
    with pytest.raises(ValueError, match=r"not a tf\.train\.Example"):
        read_example(b"\xff\xd8\xff\xe0 a picture")
