"""Batches of images: split, complete epochs, resumable, the same on any number of hosts and workers."""

import itertools
import json

import numpy as np
import pytest
from image_cases import write_folder

from ml.data import CropConfig, ImageDataConfig, heldout_batches, make_loader, padding, prepare
from ml.errors import UserError


def folder_config(root, **changes):
    crop = CropConfig(kind="resized", flip=True)
    return ImageDataConfig(
        **{"source": "folder", "path": str(root), "image_size": 4, "channels": 3, "crop": crop, **changes}
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = write_folder(tmp_path_factory.mktemp("images") / "train", 8)
    return prepare(folder_config(root), root)


def take(loader, count):
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def test_some_images_are_held_out_and_no_others(prepared):
    (source,) = prepared.sources
    names = [[side.name(row) for row in range(len(side))] for side in (source.train, source.heldout)]
    assert sorted(names[0] + names[1]) == sorted(f"{c}/{n}.png" for c in prepared.classes for n in range(8))
    assert 0 < prepared.heldout_rows < 12 and prepared.train_rows + prepared.heldout_rows == 24
    batches = list(heldout_batches(prepared, global_batch_size=8))
    assert sum(batch["loss_mask"].sum() for batch in batches) == prepared.heldout_rows


def test_a_run_goes_on_where_it_was_and_sees_other_parts_each_epoch(prepared):
    loader = make_loader(prepared, global_batch_size=4, seed=1)
    whole = take(loader, 12)
    first = make_loader(prepared, global_batch_size=4, seed=1)
    again = take(first, 5)
    second = make_loader(prepared, global_batch_size=4, seed=1, num_workers=0)
    second.set_state(json.loads(json.dumps(first.get_state())))
    again += take(second, 7)
    for one, other in zip(whole, again, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    rows = np.concatenate([batch["images"] for batch in whole])
    assert len({row.tobytes() for row in rows}) > prepared.train_rows / 2
    parts = [
        take(make_loader(prepared, global_batch_size=4, seed=1, shard_index=i, shard_count=2), 3) for i in range(2)
    ]
    for number in range(3):
        both = np.concatenate([parts[0][number]["images"], parts[1][number]["images"]])
        np.testing.assert_array_equal(both, whole[number]["images"])


def test_other_crops_are_other_data(prepared):
    state = make_loader(prepared, global_batch_size=4, seed=1).get_state()
    other = prepare(folder_config(prepared.config.path, crop=CropConfig()), "")
    with pytest.raises(UserError, match="the checkpoint was written with other data"):
        make_loader(other, global_batch_size=4, seed=1).set_state(state)


def test_a_folder_of_its_own_for_evaluation(tmp_path):
    root = write_folder(tmp_path / "train", 3)
    val = write_folder(tmp_path / "val", 2, classes=("cat", "emu"))
    prepared = prepare(folder_config(root, heldout_path=str(val)), tmp_path)
    assert (prepared.train_rows, prepared.heldout_rows) == (9, 4)
    (batch,) = heldout_batches(prepared, global_batch_size=4)
    assert batch["targets"].ravel().tolist() == [0, 0, 2, 2]
    prepared.save(tmp_path)
    assert json.loads((tmp_path / "classes.json").read_text()) == ["cat", "dog", "emu"]


def test_says_when_nothing_is_left(tmp_path):
    root = write_folder(tmp_path / "train", 1)
    with pytest.raises(
        UserError, match=r"config\.data\.heldout_fraction=0\.001 leaves 3 of 3 images to train on and 0"
    ):
        prepare(folder_config(root, heldout_fraction=0.001), root, where="config.data")


def test_padding_has_a_batchs_arrays(prepared):
    batch = next(iter(heldout_batches(prepared, global_batch_size=2)))
    empty = padding(prepared.config, 2)
    assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {n: (x.shape, x.dtype) for n, x in empty.items()}
