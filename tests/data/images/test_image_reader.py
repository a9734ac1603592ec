"""What is seen of an image, that it is the same each time, and what stands in the place of a broken one."""

import logging

import numpy as np
import pytest
from image_cases import gradient_image, write_folder

from ml.data.images.config import CropConfig, ImageDataConfig
from ml.data.images.reader import ImageReader, drawn, random_box, whole
from ml.data.images.stores import Folder
from ml.errors import UserError

CONFIG = ImageDataConfig(source="folder", path="x", image_size=4, channels=3)


def generator(number=0):
    return np.random.Generator(np.random.Philox(key=[3, number]))


def config(**crop):
    return ImageDataConfig(source="folder", path="x", image_size=8, channels=3, crop=CropConfig(**crop))


def test_evaluation_sees_the_middle():
    pixels = whole(
        gradient_image(20, 12), ImageDataConfig(source="folder", path="x", image_size=6, resize=12, channels=3)
    )
    # The shorter side is 12 already, and the middle 6 of it begin at column 7 and row 3.
    np.testing.assert_array_equal(pixels[0, :, 0], np.arange(7, 13))
    np.testing.assert_array_equal(pixels[:, 0, 1], np.arange(3, 9))
    assert whole(gradient_image(20, 12), CONFIG).shape == (4, 4, 3)


def test_a_shift_moves_what_evaluation_sees():
    image, seen = gradient_image(8, 8), set()
    for number in range(60):
        pixels = drawn(image, config(kind="shift", max_shift=1), generator(number))
        inside = pixels[..., 2] == 7
        down, right = [s - int(np.argmax(inside.any(axis))) for s, axis in ((0, 1), (0, 0))]
        first = pixels[inside][0]
        seen.add((int(first[1]) + down, int(first[0]) + right))
        assert inside.sum() in (64, 56, 49)
    assert len(seen) == 9


def test_random_parts_have_the_areas_and_aspects_asked_for():
    crop = CropConfig(kind="resized", min_area=0.25, max_aspect=1.5)
    boxes = np.array([random_box((50, 50), crop, generator(number)) for number in range(400)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 50).all() and (boxes[:, 3] <= 50).all()
    area, aspect = width * height / 2500, width / height
    assert 0.24 < area.min() < 0.3 and area.max() > 0.85
    assert 1 / 1.6 < aspect.min() < 0.75 and 1.35 < aspect.max() < 1.6
    assert abs(np.log(aspect).mean()) < 0.06, "as often wide as high"


def test_where_no_part_fits_the_middle_is_taken():
    crop = CropConfig(kind="resized", min_area=1.0, max_aspect=1.25)
    assert random_box((100, 20), crop, generator()) == (37.5, 0.0, 62.5, 20.0)


def test_half_of_the_images_are_mirrored():
    mirrored = [drawn(gradient_image(8, 8), config(flip=True), generator(n))[0, 0, 0] for n in range(200)]
    assert set(mirrored) == {0, 7} and 70 < mirrored.count(7) < 130


def test_a_number_alone_decides_what_is_seen(tmp_path):
    store = Folder(str(write_folder(tmp_path / "train")), "path")
    crop = CropConfig(kind="resized", flip=True)
    varied = ImageDataConfig(source="folder", path="x", image_size=5, channels=3, crop=crop)
    reader = ImageReader([store], varied, 4)
    batch = reader(np.array([0, 5, 12, 17]))  # the last two are the first two, an epoch later
    assert batch["targets"].ravel().tolist() == [0, 1, 0, 1] and batch["loss_mask"].sum() == 4
    np.testing.assert_array_equal(reader(np.array([17]))["images"][0], batch["images"][3])
    held = ImageReader([store], varied, None)(np.array([5, 12]))
    assert held["loss_mask"].ravel().tolist() == [1, 0] and not held["images"][1].any()


def test_grey_images_have_one_channel(tmp_path):
    store = Folder(str(write_folder(tmp_path / "train")), "path")
    grey = ImageDataConfig(source="folder", path="x", image_size=4, channels=1)
    assert ImageReader([store], grey, None)(np.array([0]))["images"].shape == (1, 4, 4, 1)


def test_a_broken_file_is_named_once_skipped_and_counted(tmp_path, caplog):
    root = write_folder(tmp_path / "train")
    whole_file = (root / "cat" / "2.png").read_bytes()
    (root / "cat" / "1.png").write_text("no image at all")
    (root / "cat" / "2.png").write_bytes(whole_file[: len(whole_file) // 2])
    store = Folder(str(root), "path")
    reader = ImageReader([store], CONFIG, 0)
    with caplog.at_level(logging.WARNING):
        batch = reader(np.array([1, 2, 3, 1]))
    assert batch["broken"].ravel().tolist() == [2, 1, 0, 2] and batch["loss_mask"].sum() == 4
    np.testing.assert_array_equal(batch["images"][:, 0, 0, 1], [30, 30, 30, 30])  # number 3 stands in their place
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 2 and named[0].startswith("cat/1.png: broken, skipped (")
    held = ImageReader([store], CONFIG, None)(np.array([0, 1]))
    assert held["broken"].ravel().tolist() == [0, 1] and held["loss_mask"].ravel().tolist() == [1, 0]


def test_images_that_are_all_broken_end_the_run(tmp_path):
    root = write_folder(tmp_path / "train", 1)
    for file in root.glob("*/*.png"):
        file.write_text("no image")
    with pytest.raises(UserError, match="64 images in a row are broken, the last one"):
        ImageReader([Folder(str(root), "path")], CONFIG, 0)(np.array([0]))
