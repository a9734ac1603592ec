"""The tokenizer: lossless, deterministic, loads what others wrote, and says what does not fit."""

import json
import os
import subprocess
import sys

import pytest
import tokenizers

from ml.data.tokenizer import END_OF_TEXT, Tokenizer, check_vocab
from ml.errors import UserError

SAMPLE = [f"def function_{i}(argument):\n    return argument + {i}\n" for i in range(200)]
WEIRD = [
    "",
    " ",
    "\x00\x01\x7f",
    "tabs\tand\r\nwindows lines\r",
    "naïve café Ω ≈ ç√∫ ﬁ",
    "日本語テキスト 中文 한국어",
    "🧑‍🚀👩🏽‍💻🏳️‍🌈 flags 🇩🇪",
    "e\u0301 (combining) \u202eright-to-left\u202c \u200b",
    "\ufeffbyte-order mark \ufffd \uffff \U0010ffff",
    "Zalgo t̷̢̛e̸x̶t",
    f"a spelled-out {END_OF_TEXT} is text",
    "   leading and trailing   ",
]


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(SAMPLE, 300)


@pytest.mark.parametrize("text", WEIRD)
def test_round_trip_is_exact(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.encode_batch([text, "x", text])[2] == ids


def test_trained_vocabulary(trained):
    assert trained.vocab_size == 300
    assert trained.eos_id == trained.bos_id == 0
    assert trained.eos_token == END_OF_TEXT
    assert len(trained.encode(SAMPLE[0])) < len(SAMPLE[0]) / 2
    assert trained.decode([trained.eos_id, *trained.encode("x")]) == "x"
    assert trained.decode([trained.eos_id], skip_special=False) == END_OF_TEXT


def test_special_tokens_in_text_are_text_unless_asked_for(trained):
    text = f"a{END_OF_TEXT}b"
    assert trained.eos_id not in trained.encode(text)
    assert trained.eos_id not in trained.encode_batch([text])[0]
    assert trained.encode(text, parse_special=True).count(trained.eos_id) == 1


def test_training_does_not_depend_on_the_hash_seed(trained):
    code = f"from ml.data.tokenizer import Tokenizer\nprint(Tokenizer.train({SAMPLE!r}, 300).fingerprint)"
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == trained.fingerprint == Tokenizer.train(SAMPLE, 300).fingerprint


def test_save_and_load(trained, tmp_path):
    trained.save(tmp_path / "folder")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for path in (tmp_path / "folder", tmp_path / "folder" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == trained.fingerprint
        assert loaded.encode(WEIRD[5]) == trained.encode(WEIRD[5])


def _other_peoples_tokenizer(folder, specials, settings=None, **files):
    """A tokenizer.json with cutting, padding and a template that adds tokens, as published ones have them."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=specials,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(SAMPLE, trainer)
    if specials:
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{specials[0]} $A", special_tokens=[(specials[0], 0)]
        )
        model.enable_padding(length=50, pad_token=specials[0])
    model.enable_truncation(4)
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    for name, content in {**({"tokenizer_config": settings} if settings else {}), **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_foreign_truncation_padding_and_templates_do_not_touch_documents(tmp_path):
    tokenizer = Tokenizer.load(_other_peoples_tokenizer(tmp_path / "t", ["<s>", "</s>"]))
    text = "a text that is longer than four tokens, certainly"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.encode_batch([text, "x"])[0] == ids


@pytest.mark.parametrize(
    ("specials", "files", "bos", "eos"),
    [
        (["<s>", "</s>"], {}, "<s>", "</s>"),
        (["<|begin_of_text|>", "<|end_of_text|>"], {}, "<|begin_of_text|>", "<|end_of_text|>"),
        (
            ["<|endoftext|>", "<|im_end|>"],
            {"tokenizer_config": {"eos_token": "<|im_end|>", "bos_token": None}},
            "<|im_end|>",
            "<|im_end|>",
        ),
        (["<a>", "<b>"], {"tokenizer_config": {"eos_token": {"content": "<b>"}, "bos_token": "<a>"}}, "<a>", "<b>"),
        (["<a>", "<b>"], {"special_tokens_map": {"eos_token": "<b>"}}, "<b>", "<b>"),
        (["<a>", "</s>"], {"tokenizer_config": {"eos_token": "<not in the vocabulary>"}}, "</s>", "</s>"),
    ],
)
def test_which_tokens_begin_and_end_a_text(tmp_path, specials, files, bos, eos):
    tokenizer = Tokenizer.load(_other_peoples_tokenizer(tmp_path / "t", specials, **files))
    assert (tokenizer.bos_token, tokenizer.eos_token) == (bos, eos)
    assert tokenizer.decode([tokenizer.bos_id, tokenizer.eos_id], skip_special=False) == bos + eos


def test_settings_that_are_not_ours_survive_saving(tmp_path):
    settings = {"eos_token": "</s>", "chat_template": "{{ messages }}"}
    tokenizer = Tokenizer.load(_other_peoples_tokenizer(tmp_path / "t", ["</s>"], settings))
    tokenizer.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved["chat_template"] == "{{ messages }}"


def test_loading_errors_name_the_place(tmp_path):
    with pytest.raises(UserError, match=r"data\.tokenizer\.path: .*missing.* does not exist"):
        Tokenizer.load(tmp_path / "missing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match=r"no end-of-text token.*eos_token"):
        Tokenizer.load(_other_peoples_tokenizer(tmp_path / "none", []))
    folder = _other_peoples_tokenizer(tmp_path / "broken", ["</s>"])
    (folder / "tokenizer_config.json").write_text("[1")
    with pytest.raises(UserError, match=r"tokenizer_config\.json.*not a JSON object"):
        Tokenizer.load(folder)


def test_vocabulary_must_fit_the_model(trained):
    check_vocab(trained, 300)
    check_vocab(trained, 512)
    with pytest.raises(UserError, match=r"model\.vocab_size=299 .*ids go up to 299; set model\.vocab_size=384"):
        check_vocab(trained, 299)
