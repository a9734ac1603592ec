"""The tokenizer: a byte-level BPE trained on the spot, or any ``tokenizer.json``."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ml.errors import UserError

END_OF_TEXT = "<|endoftext|>"
# Tried in this order when no tokenizer_config.json says which token ends, or begins, a text.
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
_KNOWN_BEGINNINGS = ("<|begin_of_text|>", "<s>", "<bos>", "[CLS]")
# Role in an encoder's rows -> names, those of a tokenizer that is trained here first.
_OF_ENCODERS = {
    "pad": ("[PAD]", "<pad>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}


class Tokenizer:
    """Text to ids and back.

    Attributes:
      eos_token, eos_id: end of text; closes every document.
      bos_token, bos_id: beginning of text; opens every document. The end-of-text token where the vocabulary has none.
      vocab_size: one more than the largest id, added tokens included: a model needs at least this many embeddings.
      fingerprint: a hash over everything that decides which ids a text gets.
    """

    def __init__(self, model: tokenizers.Tokenizer, settings: dict[str, Any] | None = None, where: str = "tokenizer"):
        """Wraps a `tokenizers.Tokenizer`; ``settings`` is the content of ``tokenizer_config.json``, if there is one.

        Raises:
          UserError: no token is known to end a text.
        """
        # A tokenizer.json may ask for cut and padded output, which would lose text here.
        model.no_truncation()
        model.no_padding()
        serialized = model.to_str()
        self._settings = dict(settings or {})
        self._model = model
        # Text of a corpus that happens to spell a special token must not become one. The switch is a property of the
        # whole object, hence two of them: nobody has to flip it between calls.
        self._literal = tokenizers.Tokenizer.from_str(serialized)
        self._literal.encode_special_tokens = True

        vocabulary = model.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        end = _named_token(self._settings, "eos_token", vocabulary, _KNOWN_ENDS)
        if end is None:
            raise UserError(
                f'{where}: no end-of-text token is named: write {{"eos_token": "..."}} to tokenizer_config.json there'
            )
        # A configuration that is there but names no beginning means that there is none.
        guesses = _KNOWN_BEGINNINGS if "eos_token" not in self._settings else ()
        self.eos_token: str = end
        self.bos_token: str = _named_token(self._settings, "bos_token", vocabulary, guesses) or end
        self.eos_id: int = vocabulary[self.eos_token]
        self.bos_id: int = vocabulary[self.bos_token]
        identity = json.dumps([json.loads(serialized), self.bos_id, self.eos_id], sort_keys=True)
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, encoder: bool = False) -> "Tokenizer":
        """Trains byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2, Radford et al. 2019). Deterministic.

        Args:
          texts: the sample; a merge needs at least two occurrences in it.
          vocab_size: most entries the vocabulary may get; a small sample may give fewer.
          encoder: with the special tokens of an encoder's rows (``[CLS] A [SEP] B [SEP]``, ``[MASK]``, ``[PAD]``), not
            the end-of-text token.
        """
        roles = {role: names[0] for role, names in _OF_ENCODERS.items()} if encoder else {}
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(roles.values()) or [END_OF_TEXT],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
        if encoder:
            settings |= {"eos_token": roles["sep"], "bos_token": roles["cls"]}
            settings |= {f"{role}_token": name for role, name in roles.items()}
            model.post_processor = tokenizers.processors.TemplateProcessing(
                single="[CLS] $A [SEP]",
                pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                special_tokens=[(roles[role], model.token_to_id(roles[role])) for role in ("cls", "sep")],
            )
        return cls(model, settings)

    @classmethod
    def load(cls, path: str | os.PathLike[str], where: str = "data.tokenizer.path") -> "Tokenizer":
        """Loads a ``tokenizer.json``, or the one in a folder, with the settings files beside it.

        Raises:
          UserError: nothing there, not a tokenizer file, or no end-of-text token; ``where`` names the field.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{where}: {str(file)!r} does not exist: give a tokenizer.json or a folder that holds one")
        try:
            model = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{where}: {str(file)!r} is not a tokenizer.json ({error})") from error
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            extra = file.with_name(name)
            if extra.is_file():
                try:
                    settings |= json.loads(extra.read_text(encoding="utf-8"))
                except (ValueError, TypeError) as error:
                    raise UserError(f"{where}: {str(extra)!r} is not a JSON object ({error})") from error
        return cls(model, settings, where=str(file))

    def to_json(self) -> str:
        """The content of its ``tokenizer.json``."""
        return self._model.to_str()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``tokenizer.json`` and ``tokenizer_config.json``, which Hugging Face libraries read as well."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = self._settings | {"eos_token": self.eos_token, "bos_token": self.bos_token}
        for name, text in (
            ("tokenizer.json", self._model.to_str(pretty=True)),
            ("tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False)),
        ):
            partial = folder / f".{name}.{os.getpid()}"
            partial.write_text(text, encoding="utf-8")
            partial.replace(folder / name)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Ids of ``text`` alone, nothing added.

        Args:
          text: any string.
          parse_special: turn spelled-out special tokens into their ids (for prompts written with them); otherwise
            they are text like any other.
        """
        model = self._model if parse_special else self._literal
        return model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, as `encode` gives them, on all cores."""
        return [encoding.ids for encoding in self._literal.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_words(self, texts: Sequence[str]) -> list[tuple[list[int], list[bool]]]:
        """Ids of each text, and which of them begin a word, by the tokenizer's own rule for words."""
        encodings = self._literal.encode_batch(list(texts), add_special_tokens=False)
        return [(e.ids, [a != b for a, b in zip(e.word_ids, [None, *e.word_ids], strict=False)]) for e in encodings]

    def encoder_ids(self, where: str = "data.tokenizer") -> dict[str, int]:
        """Ids of the special tokens of an encoder's rows: ``cls``, ``sep``, ``mask`` and ``pad``.

        Raises:
          UserError: the tokenizer has no such token; ``where`` names the field.
        """
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        ids = {}
        for role, known in _OF_ENCODERS.items():
            name = _named_token(self._settings, f"{role}_token", vocabulary, known)
            if name is None:
                raise UserError(f"{where}: has no {known[0]} token; masked tokens need an encoder's tokenizer (BERT's)")
            ids[role] = vocabulary[name]
        return ids

    def special_ids(self) -> frozenset[int]:
        """Ids of all tokens that are no text."""
        return frozenset(id for id, token in self._model.get_added_tokens_decoder().items() if token.special)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``; bytes that are not UTF-8 (a character cut in half) become U+FFFD."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=skip_special)


def check_vocab(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raises `UserError` when the tokenizer can give an id for which the model has no embedding."""
    if tokenizer.vocab_size > model_vocab_size:
        fit = -(-tokenizer.vocab_size // 128) * 128
        raise UserError(
            f"model.vocab_size={model_vocab_size} is too small: the tokenizer's ids go up to "
            f"{tokenizer.vocab_size - 1}; set model.vocab_size={fit}, or use the model's own tokenizer"
        )


def _named_token(settings: dict[str, Any], key: str, vocabulary: dict[str, int], known: Sequence[str]) -> str | None:
    value = settings.get(key)
    if isinstance(value, dict):  # the form of an added token with its stripping rules
        value = value.get("content")
    if isinstance(value, str) and value in vocabulary:
        return value
    return next((token for token in known if token in vocabulary), None)
