"""A model with all that serving it takes: parameters, tokenizer, how its texts begin and end, chat template."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers
from jax.sharding import Mesh
from jaxtyping import PyTree

from ml.checkpoint.pretrained import load_model, load_model_config
from ml.data.tokenizer import Tokenizer, check_vocab
from ml.errors import UserError, nearest
from ml.models import TransformerConfig
from ml.serve.grammar import Grammars
from ml.serve.placement import Placement
from ml.serve.text.chat_template import ChatTemplate

WEIGHTS = ("float32", "bfloat16", "int8")
"""How weights may be kept; ``int8``: as whole numbers with scales, see `ml.models.quantization`."""


@dataclasses.dataclass(frozen=True, eq=False)
class ServedModel:
    """What a folder holds.

    Attributes:
      name: of the folder: what the API calls the model.
      config, params: the model.
      tokenizer: its tokenizer.
      opening: tokens that every text begins with.
      stop_ids: tokens that end every text.
      chat_template: how conversations are written; ``None``: it has none.
      mesh: where the parameters are, and the engine is to be; ``None``: one device.
    """

    name: str
    config: TransformerConfig
    params: PyTree
    tokenizer: Tokenizer
    opening: list[int]
    stop_ids: frozenset[int]
    chat_template: ChatTemplate | None = None
    mesh: Mesh | None = None

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        step: int | None = None,
        weights: str | None = None,
        chat_template: str | os.PathLike[str] | None = None,
        mesh: Mesh | None = None,
    ) -> "ServedModel":
        """Loads a work directory of a training run, or a Hugging Face folder with tokenizer.

        Args:
          folder: where it is.
          step: which checkpoint of a work directory; ``None``: the newest.
          weights: how parameters are kept: see `WEIGHTS`; ``None``: as this machine computes (`serving_dtype`).
          chat_template: a file with a Jinja template, to be used instead of the folder's own.
          mesh: of the engine: each device gets its part of the parameters; ``None``: one device.

        Raises:
          UserError: something is missing there, damaged, or does not belong together, or does not fit the mesh.
        """
        folder = Path(folder).expanduser()
        dtype = serving_dtype(weights)  # refuses what is no such way
        int8 = weights == "int8"  # rounded from what was saved, not from what was rounded before
        sharding = None if mesh is None else Placement(load_model_config(folder), mesh).of_leaf
        config, params, path = load_model(
            folder, step=step, dtype=None if int8 else dtype, sharding=sharding, int8=int8
        )
        if path is None:
            raise UserError(f"{folder} has no tokenizer.json: copy the one the model was trained with there")
        tokenizer = Tokenizer.load(path, where="tokenizer")
        check_vocab(tokenizer, config.vocab_size)
        return cls(
            name=folder.resolve().name,
            config=config,
            params=params,
            tokenizer=tokenizer,
            opening=_opening(folder, tokenizer, path),
            stop_ids=_stop_ids(folder, tokenizer),
            chat_template=ChatTemplate.load(folder, None if chat_template is None else Path(chat_template)),
            mesh=mesh,
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with the opening tokens; special tokens that it spells out are those tokens."""
        return self.opening + self.tokenizer.encode(text, parse_special=True) or [self.tokenizer.bos_id]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **more: Any,
    ) -> list[int]:
        """Ids of a conversation, as the chat template writes it; arguments are those of `ChatTemplate.render`.

        Raises:
          UserError: there is no chat template, or it refuses the conversation.
        """
        if self.chat_template is None:
            raise UserError(
                f"messages: the model {self.name!r} has no chat template (no chat_template.jinja, and none in "
                "tokenizer_config.json): give one with --chat_template=FILE, or send a prompt for completion"
            )
        # What a template writes begins with the opening tokens where the model wants them.
        text = self.chat_template.render(messages, tools, add_generation_prompt, **more)
        return self.tokenizer.encode(text, parse_special=True) or [self.tokenizer.bos_id]

    def grammars(self) -> Grammars:
        """What an engine needs for requests with a structured output; takes a second for a large vocabulary."""
        return Grammars(self.tokenizer, self.config.vocab_size, self.stop_ids)


def serving_dtype(weights: str | None = None) -> Any:
    """The type of activations: that of float weights, else what this machine computes with.

    That is bfloat16, and float32 on a CPU, which has no fast bfloat16.

    Raises:
      UserError: ``weights`` is not one of `WEIGHTS`.
    """
    if weights is not None and weights not in WEIGHTS:
        raise UserError(f"weights={weights!r}: no such way to keep them; {nearest(weights, WEIGHTS)}")
    if weights is None or weights == "int8":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return getattr(jnp, weights)


def _opening(folder: Path, tokenizer: Tokenizer, tokenizer_path: Path) -> list[int]:
    """The tokens that every text began with in training."""
    experiment = folder / "experiment.json"
    if experiment.is_file() and "data" in json.loads(experiment.read_text(encoding="utf-8")):
        return [tokenizer.bos_id]  # as ml.data packs documents
    # A model from elsewhere: its tokenizer says what it puts before a text.
    model = tokenizers.Tokenizer.from_file(str(tokenizer_path))
    bare, whole = (model.encode("a", add_special_tokens=special).ids for special in (False, True))
    starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
    return whole[: starts[0]] if starts else []


def _stop_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """End of text, and what a Hugging Face folder adds to it (the end of a turn, for chat models)."""
    path = folder / "generation_config.json"
    more = None
    if path.is_file():
        try:
            more = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path} is not a JSON object ({error}): mend or remove it") from error
    more = more if isinstance(more, list) else [more]
    return frozenset({tokenizer.eos_id, *(each for each in more if isinstance(each, int))})
