"""`ml/data/image_text`: each format gives the same pairs, a broken image is no pair, and captions stay with images."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ml.data import (
    ImageDataConfig,
    ImageTextDataConfig,
    TokenizerConfig,
    heldout_batches,
    make_loader,
    padding,
    prepare,
)
from ml.data.image_text.sources import DIGIT_NAMES
from ml.errors import UserError

NAMES = ("red", "green", "blue", "black", "white", "pink", "grey")
COLORS = {name: (i * 20, 255 - i * 20, i * 7) for i, name in enumerate(NAMES)}


def image(name):
    data = io.BytesIO()
    Image.new("RGB", (10, 6), COLORS[name]).save(data, "PNG")
    return data.getvalue()


def write(folder, form, broken=()):
    """The same pairs in every format; returns the path to give."""
    folder.mkdir(exist_ok=True)
    content = {name: b"no image" if name in broken else image(name) for name in COLORS}
    if form == "webdataset":
        with tarfile.open(folder / "shard-0.tar", "w") as archive:
            for name, data in content.items():
                members = [(f"{name}.png", data), (f"{name}.json", json.dumps({"caption": f"all {name}"}).encode())]
                members = (
                    [*members, (f"{name}.cls", b"1")] if name != "pink" else [members[0], ("pink.txt", b"all pink")]
                )
                for member, text in members:
                    info = tarfile.TarInfo(member)
                    info.size = len(text)
                    archive.addfile(info, io.BytesIO(text))
        return str(folder)
    (folder / "images").mkdir()
    for name, data in content.items():
        (folder / f"images/{name}.png").write_bytes(data)
    rows = [{"file": f"images/{name}.png", "text": f"all {name}"} for name in COLORS]
    if form == "jsonl":
        path = folder / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)
    path = folder / "pairs.tsv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, ["text", "file"], delimiter="\t")
        table.writeheader()
        table.writerows(rows)
    return str(path)


def config(form, path, **changes):
    fields = {"image_field": "file", "caption_field": "text"} if form != "webdataset" else {}
    return ImageTextDataConfig(
        **{"format": form, "path": path, "image_size": 4, "text_length": 12, "heldout_fraction": 0.0}
        | {"tokenizer": TokenizerConfig(vocab_size=300), **fields, **changes}
    )


def told(batch, prepared):
    """The color of each image, and what its caption says."""
    found = []
    for pixels, tokens, segments, mask in zip(
        batch["images"], batch["tokens"], batch["segment_ids"], batch["loss_mask"], strict=True
    ):
        if mask[0]:
            (color,) = {tuple(x) for x in pixels.reshape(-1, 3).tolist()}
            assert tokens[segments == 1][-1] == prepared.tokenizer.eos_id
            found.append((color, prepared.tokenizer.decode(tokens[segments == 1])))
    return found


@pytest.mark.parametrize("form", ["jsonl", "csv", "webdataset"])
def test_every_format_gives_each_image_its_caption(form, tmp_path):
    prepared = prepare(config(form, write(tmp_path / "pairs", form)), tmp_path)
    (batch,) = heldout_batches(prepared, global_batch_size=8, side="train")
    assert sorted(told(batch, prepared)) == sorted((color, f"all {name}") for name, color in COLORS.items())
    nothing = padding(prepared.config, 8)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (v.shape, v.dtype) for k, v in nothing.items()}
    again = prepare(prepared.config, tmp_path)
    assert again.sources[0].train.digest == prepared.sources[0].train.digest


def test_a_broken_image_is_counted_and_anothers_caption_never_taken(tmp_path, caplog):
    prepared = prepare(
        config("webdataset", write(tmp_path / "pairs", "webdataset", broken=("blue", "white"))), tmp_path
    )
    (batch,) = heldout_batches(prepared, global_batch_size=8, side="train")
    assert len(told(batch, prepared)) == 5 and batch["broken"].sum() == 2
    loader = make_loader(prepared, global_batch_size=14, seed=0)
    batch = next(loader)
    pairs = told(batch, prepared)
    loader.close()
    assert len(pairs) == 14 and batch["broken"].sum() >= 2
    assert all(COLORS[caption.removeprefix("all ")] == color for color, caption in pairs)
    assert "broken, skipped" in caplog.text


def test_each_epoch_draws_a_caption_and_the_same_on_every_start(tmp_path):
    path = write(tmp_path / "pairs", "jsonl")
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    several = [json.dumps(line | {"text": [f"{line['text']} {i}" for i in range(4)]}) for line in lines]
    (tmp_path / "pairs/several.jsonl").write_text("\n".join(several))
    prepared = prepare(config("jsonl", str(tmp_path / "pairs/several.jsonl")), tmp_path)

    def epochs(seed):
        loader = make_loader(prepared, global_batch_size=7, seed=seed)
        found = [sorted(told(next(loader), prepared)) for _ in range(6)]
        loader.close()
        return found

    first = epochs(0)
    assert first == epochs(0) and all(len({color for color, _ in epoch}) == 7 for epoch in first)
    assert len({caption for epoch in first for color, caption in epoch if color == COLORS["red"]}) > 1


def test_digits_hold_out_what_their_classification_holds_out(tmp_path):
    prepared = prepare(
        ImageTextDataConfig(
            image_size=8, channels=1, text_length=16, heldout_fraction=0.2, tokenizer=TokenizerConfig("", 400)
        ),
        tmp_path,
    )
    labelled = prepare(ImageDataConfig(source="digits", image_size=8, channels=1, heldout_fraction=0.2), tmp_path)
    pairs = next(iter(heldout_batches(prepared, global_batch_size=64)))
    images = next(iter(heldout_batches(labelled, global_batch_size=64)))
    np.testing.assert_array_equal(pairs["images"], images["images"])
    assert prepared.heldout_rows == labelled.heldout_rows and prepared.train_rows + prepared.heldout_rows == 1797
    text = prepared.tokenizer.decode(pairs["tokens"][0][pairs["segment_ids"][0] == 1])
    assert text == f"a photo of the digit {DIGIT_NAMES[images['targets'][0, 0]]}."


@pytest.mark.parametrize(
    ("form", "content", "message"),
    [
        ("jsonl", '{"file": "a.png", "text": "a"}\n{oops\n', r"pairs\.jsonl:2: malformed JSON"),
        ("jsonl", '{"file": "a.png"}\n', r"pairs\.jsonl:1: has no 'file' and 'text'; set image_field"),
        ("jsonl", '{"file": 3, "text": "a"}\n', r"pairs\.jsonl:1: the image must be a path"),
        ("csv", "image,text\na.png,b\n", r"pairs\.csv:2: has no 'file' and 'text'"),
        ("webdataset", "no archive", r"pairs\.tar: is no whole tar file"),
    ],
)
def test_mistakes_name_the_line(form, content, message, tmp_path):
    path = tmp_path / f"pairs.{'tar' if form == 'webdataset' else form}"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        prepare(config(form, str(path)), tmp_path)


def test_mistakes_in_the_configuration():
    with pytest.raises(ValueError, match="name a file, a folder or a glob"):
        ImageTextDataConfig(format="jsonl")
    with pytest.raises(ValueError, match="text_length=2 must be at least 3"):
        ImageTextDataConfig(text_length=2)
