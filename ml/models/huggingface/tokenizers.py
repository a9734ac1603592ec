"""The tokenizer files of a Hugging Face folder, as far as they must be read or written here."""

import json
import shutil
from pathlib import Path
from typing import Any

from ml.errors import UserError

# Names that tokenizers without a tokenizer_config.json give to the token that ends a text.
_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>")
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")


def special_ids(tokenizer_path: str | Path, vocab_size: int) -> dict[str, int | None]:
    """``bos_token_id`` and ``eos_token_id`` for ``config.json``; ``None`` where the tokenizer names no such token.

    Raises:
      UserError: the file is missing or malformed, or has ids beyond ``vocab_size``.
    """
    added = _added_tokens(Path(tokenizer_path))
    if added and max(added.values()) >= vocab_size:
        raise UserError(
            f"{tokenizer_path}: has token id {max(added.values())}, but the model's vocab_size is {vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
    names = {key: _named(Path(tokenizer_path), f"{key}_token", added) for key in ("bos", "eos")}
    names["eos"] = names["eos"] or _known_end(added)
    return {f"{key}_token_id": None if name is None else added[name] for key, name in names.items()}


def write_tokenizer(folder: Path, tokenizer_path: str | Path, max_length: int) -> None:
    """Copies ``tokenizer.json`` and its companions into ``folder``; writes the companion that is missing.

    Raises:
      UserError: the file is missing or malformed.
    """
    path = Path(tokenizer_path)
    added = _added_tokens(path)
    shutil.copyfile(path, folder / "tokenizer.json")
    for name in _COMPANIONS:
        if (path.parent / name).exists():
            shutil.copyfile(path.parent / name, folder / name)
    config = folder / "tokenizer_config.json"
    if not config.exists():
        fields: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
        fields["clean_up_tokenization_spaces"] = False
        if (end := _known_end(added)) is not None:
            fields["eos_token"] = end
        config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _added_tokens(path: Path) -> dict[str, int]:
    """Content -> id of the tokens outside the learned vocabulary, the special ones among them."""
    tokenizer = _read(path)
    try:
        return {token["content"]: int(token["id"]) for token in tokenizer.get("added_tokens") or []}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a tokenizer.json ({error!r})") from None


def _known_end(added: dict[str, int]) -> str | None:
    return next((name for name in _END_NAMES if name in added), None)


def _named(path: Path, key: str, added: dict[str, int]) -> str | None:
    """The token that ``tokenizer_config.json``, beside the tokenizer, gives a role."""
    beside = path.parent / "tokenizer_config.json"
    named = _read(beside).get(key) if beside.exists() else None
    named = named.get("content") if isinstance(named, dict) else named
    return named if named in added else None


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: malformed JSON: {error}") from None
