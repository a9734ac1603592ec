"""Labelled texts: which are kept, as what, and framed how."""

import dataclasses
import json

import numpy as np
import pytest

from ml.data import DataConfig, LabelledConfig, SourceConfig, TokenizerConfig, heldout_batches, make_loader, prepare
from ml.data.sources import Source

TEXTS = [(f"text number {i} " * (1 + i % 9), ["cold", "warm", "other"][i % 3]) for i in range(60)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    with open(folder / "corpus.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text, "kind": label}) + "\n" for text, label in TEXTS)
    source = SourceConfig(kind="jsonl", path=str(folder / "corpus.jsonl"), label_field="kind")
    labelled = LabelledConfig(("warm", "cold"))
    return prepare(
        DataConfig((source,), TokenizerConfig(vocab_size=280), 16, heldout_fraction=0.3, labelled=labelled), folder
    )


def test_each_text_of_a_class_comes_once_framed_and_cut(prepared):
    tokenizer, label_of = prepared.tokenizer, dict(TEXTS)
    ids = tokenizer.encoder_ids()
    seen = 0
    for side in ("train", "heldout"):
        for batch in heldout_batches(prepared, global_batch_size=8, side=side):
            for row in np.flatnonzero(batch["loss_mask"][:, 0]):
                size = batch["segment_ids"][row].sum()
                tokens = batch["tokens"][row]
                assert tokens[0] == ids["cls"] and tokens[size - 1] == ids["sep"] and set(tokens[size:]) <= {ids["pad"]}
                text = tokenizer.decode(tokens[1 : size - 1])
                whole = next(t for t in label_of if t.startswith(text) and (len(t) == len(text) or size == 16))
                assert ("warm", "cold")[batch["targets"][row, 0]] == label_of[whole]
                seen += 1
            padding = batch["loss_mask"][:, 0] == 0
            assert not batch["segment_ids"][padding].any()
    assert seen == prepared.train_rows + prepared.heldout_rows == 40, "those of the third class are left out"
    loader = make_loader(prepared, global_batch_size=4, seed=0)
    assert {int(x) for _ in range(4) for x in next(loader)["targets"][:, 0]} == {0, 1}
    loader.close()


def test_docstrings_are_labelled_with_their_package(tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "module.py").write_text('"""Of the module."""\n\ndef f():\n    """Of f."""\n')
    (tmp_path / "single.py").write_text('"""Of single."""\n')
    documents = Source(SourceConfig(kind="python_docstrings", path=str(tmp_path))).documents()
    assert [(d.text, d.label) for d in documents] == [
        ("Of the module.", "pack"),
        ("Of f.", "pack"),
        ("Of single.", "single"),
    ]
    (prose,) = Source(SourceConfig(kind="python_prose", path=str(tmp_path / "pack"))).documents()
    assert prose.text == "Of the module.\n\nOf f." and prose.key == "module.py"


def test_training_hides_other_tokens_in_each_epoch_and_evaluation_hides_none(prepared):
    hiding = dataclasses.replace(prepared.config, labelled=LabelledConfig(("warm", "cold"), mask_fraction=0.3))
    hidden, ids = dataclasses.replace(prepared, config=hiding), prepared.tokenizer.encoder_ids()
    stores = [source.train for source in prepared.sources]
    texts = sum(map(len, stores))
    plain = prepared.reader(stores, None)(np.arange(texts))

    read = hidden.reader(stores, 5)
    epochs = [read(np.arange(texts) + epoch * texts) for epoch in range(40)]
    masked = np.stack([batch["tokens"] == ids["mask"] for batch in epochs])
    regular = (plain["segment_ids"] == 1) & ~np.isin(plain["tokens"], [ids["cls"], ids["sep"]])
    assert 0.27 < masked[:, regular].mean() < 0.33 and not masked[:, ~regular].any()
    assert (masked[:, regular].mean(0) < 0.8).all() and (masked[:, regular].mean(0) > 0.02).all(), "each now and then"
    for batch, where in zip(epochs, masked, strict=True):
        np.testing.assert_array_equal(np.where(where, plain["tokens"], batch["tokens"]), plain["tokens"])
        np.testing.assert_array_equal(batch["targets"], plain["targets"])
    np.testing.assert_array_equal(hidden.reader(stores, 5)(np.arange(4))["tokens"], epochs[0]["tokens"][:4])
    assert (hidden.reader(stores, 6)(np.arange(texts))["tokens"] != epochs[0]["tokens"]).any()

    for side in ("train", "heldout"):
        for batch in heldout_batches(hidden, global_batch_size=8, side=side):
            assert not (batch["tokens"] == ids["mask"]).any()
    loader = make_loader(hidden, global_batch_size=4, seed=0)
    assert any((next(loader)["tokens"] == ids["mask"]).any() for _ in range(2))
    loader.close()


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_not_all_of_a_text_can_be_hidden(fraction):
    with pytest.raises(ValueError, match=r"mask_fraction=.* must lie in"):
        LabelledConfig(("warm", "cold"), mask_fraction=fraction)


@pytest.mark.parametrize("labels", [(), ("one",), ("one", "one")])
def test_two_classes_are_the_least(labels):
    with pytest.raises(ValueError, match="two or more classes"):
        LabelledConfig(labels)
