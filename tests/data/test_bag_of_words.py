"""The baseline learns what words tell, on training's own split, and needs labels."""

import json
import random

import pytest

from ml.data import DataConfig, LabelledConfig, SourceConfig, prepare
from ml.data.bag_of_words import bag_of_words
from ml.errors import UserError


def test_words_that_tell_the_label_do(tmp_path):
    choose = random.Random(0)
    words = {"hot": ["sun", "fire", "desert"], "cold": ["ice", "snow", "winter"]}
    with open(tmp_path / "corpus.jsonl", "w") as file:
        for i in range(90):
            label = choose.choice(["hot", "cold", "cold"])
            text = f"{' '.join(choose.choices(words[label] + ['the', 'of'] * 3, k=12))} {i}"
            file.write(json.dumps({"text": text, "label": label}) + "\n")
    source = SourceConfig(kind="jsonl", path=str(tmp_path / "corpus.jsonl"))
    data = DataConfig((source,), sequence_length=32, heldout_fraction=0.3, labelled=LabelledConfig(("cold", "hot")))
    found = bag_of_words(data)
    assert found["accuracy"] > 0.9 > found["majority"] > 0.4
    prepared = prepare(data, tmp_path)
    assert (found["train_texts"], found["heldout_texts"]) == (prepared.train_rows, prepared.heldout_rows)


def test_a_split_without_texts_is_named(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"text": "alone", "label": "a"}\n')
    source = SourceConfig(kind="jsonl", path=str(tmp_path / "corpus.jsonl"))
    with pytest.raises(UserError, match="too few labelled texts"):
        bag_of_words(DataConfig((source,), labelled=LabelledConfig(("a", "b"))))
