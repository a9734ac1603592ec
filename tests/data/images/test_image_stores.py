"""Where images lie: folders, records, digits; and what is said of folders that hold none."""

import io
import pickle

import numpy as np
import pytest
from image_cases import CLASSES, example, write_folder
from PIL import Image

from ml.data.images.stores import ArrayRecords, Digits, Folder
from ml.errors import UserError


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    root = write_folder(tmp_path / "train", 2)
    (root / "dog" / "deeper").mkdir()
    Image.new("RGB", (3, 3), (1, 2, 3)).save(root / "dog" / "deeper" / "x.JPG", "jpeg")
    (root / "dog" / "notes.txt").write_text("not an image")
    store = Folder(str(root), "data.path")
    names = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png", "dog/deeper/x.JPG", "emu/0.png", "emu/1.png"]
    assert [store.name(i) for i in range(len(store))] == names and store.classes == CLASSES
    image, label = pickle.loads(pickle.dumps(store)).read(3)
    assert label == 1 and image.getpixel((0, 0)) == (40, 10, 200)
    assert store.digest == Folder(str(root), "data.path").digest
    (root / "emu" / "1.png").unlink()
    assert store.digest != Folder(str(root), "data.path").digest


def test_says_what_a_folder_lacks(tmp_path):
    def refused(path, classes=None):
        with pytest.raises(UserError) as caught:
            Folder(str(path), "config.data.path", classes)
        return str(caught.value)

    assert refused(tmp_path / "no").startswith(f"config.data.path={tmp_path / 'no'}: does not exist")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(tmp_path / "file")
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "bare" / "x.png")
    assert "holds no class folders" in refused(tmp_path / "bare")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    assert "its 1 class folders hold no image" in refused(tmp_path / "empty")
    assert "class 'cat' is not among the training images" in refused(tmp_path / "empty", ("dog",))


def test_records_have_their_classes_beside_them(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    for part, labels in enumerate([(0, 2), (1,)]):
        writer = ArrayRecordWriter(str(tmp_path / f"images.array_record-0000{part}-of-00002"), "group_size:1")
        for label in labels:
            encoded = io.BytesIO()
            Image.new("RGB", (4, 4), (label, 0, 0)).save(encoded, "png")
            writer.write(example(image=encoded.getvalue(), label=label, file_name=b"x.png"))
        writer.close()
    with pytest.raises(UserError, match=r"lacks label\.labels\.txt"):
        ArrayRecords(str(tmp_path), "data.path")
    (tmp_path / "label.labels.txt").write_text("\n".join(CLASSES) + "\n")
    store = pickle.loads(pickle.dumps(ArrayRecords(str(tmp_path), "data.path")))
    assert store.classes == CLASSES
    found = [(image.getpixel((0, 0))[0], label) for image, label in map(store.read, range(len(store)))]
    assert found == [(0, 0), (2, 2), (1, 1)]
    with pytest.raises(UserError, match="no such file"):
        ArrayRecords(str(tmp_path / "*.tfrecord"), "data.path")
    (tmp_path / "bad.array_record").write_text("nothing of the kind")
    with pytest.raises(UserError, match="not ArrayRecord files"):
        ArrayRecords(str(tmp_path / "bad.array_record"), "data.path")


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    store, data = Digits(), load_digits()
    assert len(store) == 1797 and store.classes == tuple("0123456789")
    image, label = store.read(1000)
    assert label == data.target[1000]
    np.testing.assert_allclose(np.asarray(image) / 255, data.images[1000] / 16, atol=0.5 / 255)
