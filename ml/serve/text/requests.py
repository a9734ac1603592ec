"""OpenAI's request bodies as prompts and sampling parameters: every field checked, every error naming it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml.errors import UserError
from ml.serve.sampling import SamplingParams
from ml.serve.text.fields import FieldError, Fields
from ml.serve.text.messages import chat_messages, chat_tools
from ml.serve.text.served_model import ServedModel
from ml.serve.text.structured import FIELDS as STRUCTURED
from ml.serve.text.structured import structured_output

# OpenAI's default for completions; a chat may use all the room that there is.
_COMPLETION_TOKENS = 16
_MOST_STOP_STRINGS = 16
_MOST_SAMPLES = 1024
# Fields of `SamplingParams` by how they are read, under the same name.
_NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_INTEGERS = ("min_tokens", "n", "top_k")
_COMMON = (
    *_NUMBERS,
    *_INTEGERS,
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "model",
    "seed",
    "stop",
    "stop_token_ids",
    "stream",
    "stream_options",
    *STRUCTURED,
    # Taken and of no effect here: accounting, storage and hints of OpenAI's.
    "metadata",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
_OF_COMPLETIONS = frozenset({*_COMMON, "best_of", "echo", "prompt", "suffix"})
_OF_CHATS = frozenset(
    {
        *_COMMON,
        "add_generation_prompt",
        "chat_template_kwargs",
        "max_completion_tokens",
        "messages",
        "modalities",
        "parallel_tool_calls",
        "reasoning_effort",
        "tool_choice",
        "tools",
        "top_logprobs",
    }
)


@dataclasses.dataclass(frozen=True)
class TextRequest:
    """What a body asks for.

    Attributes:
      chat: whether it is a conversation; else prompts to complete.
      prompts: token ids of each prompt.
      sampling: of each prompt.
      include_stop: whether the string that ends a text (``SamplingParams.stop``) is part of it.
      echo: the text of each prompt, to be put before what is written; empty: none.
    """

    chat: bool
    prompts: tuple[Sequence[int], ...]
    sampling: tuple[SamplingParams, ...]
    include_stop: bool = False
    echo: tuple[str, ...] = ()


def read_completion(
    body: Mapping[str, Any], model: ServedModel, *, max_length: int | None = None, seed: int = 0
) -> TextRequest:
    """Reads a body of ``/v1/completions``.

    Args:
      body: parsed JSON; ``null`` is as good as absent.
      model: which is asked.
      max_length: most tokens of prompt and completion together; ``None``: the model's longest sequence.
      seed: where the body gives none.

    Raises:
      FieldError: a field is unknown, missing, of a wrong type or out of range, or the prompt leaves no room.
    """
    fields = Fields(body, _OF_COMPLETIONS)
    if fields.text("suffix"):
        raise FieldError("suffix", "is not supported: the model only continues texts; leave it out")
    prompts, texts = _prompts(fields, model)
    logprobs = fields.integer("logprobs")
    most = fields.integer("max_tokens")
    sampling = _sampling(fields, model, seed, logprobs)
    n = sampling["n"]
    if (best_of := fields.integer("best_of")) is not None:
        if best_of > _MOST_SAMPLES:
            raise FieldError("best_of", f"is {best_of}; at most {_MOST_SAMPLES}")
        if best_of > n and fields.flag("stream"):
            raise FieldError("best_of", "does not go together with stream: the best is known at the end")
        sampling["best_of"] = best_of
    echo: tuple[str, ...] = ()
    if fields.flag("echo"):
        sampling["prompt_logprobs"] = logprobs
        echo = tuple(model.tokenizer.decode(p) if t is None else t for p, t in zip(prompts, texts, strict=True))
    return TextRequest(
        chat=False,
        prompts=tuple(prompts),
        sampling=tuple(
            _build(
                {**sampling, "seed": (sampling["seed"] + i * (best_of or n)) % 2**32},
                _room(prompt, "prompt", most, _COMPLETION_TOKENS, max_length or model.config.max_length),
            )
            for i, prompt in enumerate(prompts)
        ),
        include_stop=fields.flag("include_stop_str_in_output"),
        echo=echo,
    )


def read_chat(
    body: Mapping[str, Any], model: ServedModel, *, max_length: int | None = None, seed: int = 0
) -> TextRequest:
    """Reads a body of ``/v1/chat/completions``; arguments and errors are those of `read_completion`."""
    fields = Fields(body, _OF_CHATS)
    messages = chat_messages(fields)
    tools = chat_tools(fields)
    more = dict(fields.mapping("chat_template_kwargs") or {})
    if (effort := fields.text("reasoning_effort")) is not None:
        more.setdefault("reasoning_effort", effort)
    for name in ("messages", "tools", "add_generation_prompt"):
        if name in more:
            raise FieldError("chat_template_kwargs", f"{name!r} is a field of its own: put it there")
    if fields.listing("modalities") not in (None, ["text"]):
        raise FieldError("modalities", 'must be ["text"]')
    top = fields.integer("top_logprobs")
    wanted = fields.flag("logprobs")
    if top is not None and not wanted:
        raise FieldError("top_logprobs", "needs logprobs: true beside it")
    sampling = _sampling(fields, model, seed, (top or 0) if wanted else None)
    most, name = fields.integer("max_completion_tokens"), "max_completion_tokens"
    if most is None:
        most, name = fields.integer("max_tokens"), "max_tokens"
    try:
        prompt = model.encode_chat(messages, tools, fields.flag("add_generation_prompt", True), **more)
    except UserError as error:  # begins with "messages: "
        raise FieldError("messages", str(error).removeprefix("messages: ")) from error
    length = _room(prompt, "messages", most, None, max_length or model.config.max_length, name)
    return TextRequest(
        chat=True,
        prompts=(prompt,),
        sampling=(_build(sampling, length, name),),
        include_stop=fields.flag("include_stop_str_in_output"),
    )


# What can be asked for, by the path that OpenAI gives it.
READERS: Mapping[str, Callable[..., TextRequest]] = {
    "/v1/completions": read_completion,
    "/v1/chat/completions": read_chat,
}


def reader(url: Any) -> Callable[..., TextRequest]:
    """The reader of a path.

    Raises:
      FieldError: there is no such path.
    """
    if not isinstance(url, str) or url not in READERS:
        raise FieldError("url", f"is {url!r}; must be one of {', '.join(READERS)}")
    return READERS[url]


def check_model(body: Mapping[str, Any], model: ServedModel) -> None:
    """Raises `FieldError` if a body asks for another model; one that names none is content with any."""
    asked = body.get("model")
    if asked is not None and asked != model.name:
        raise FieldError("model", f"is {asked!r}, but {model.name!r} is what runs here: name that, or leave it out")


def _prompts(fields: Fields, model: ServedModel) -> tuple[list[list[int]], list[str | None]]:
    """Ids of each prompt, and its text where text was given."""
    prompt = fields.required("prompt")
    expected = "must be a string, a list of strings, a list of token ids, or a list of lists of token ids"
    many = prompt if isinstance(prompt, list) else [prompt]
    if not many:
        raise FieldError("prompt", f"is an empty list; {expected}")
    if _are_ids(many):
        many = [many]
    prompts: list[list[int]] = []
    texts: list[str | None] = []
    for each in many:
        if isinstance(each, str):
            prompts.append(model.encode(fields.unicode("prompt", each)))
            texts.append(each)
        elif isinstance(each, list) and each and _are_ids(each):
            if not 0 <= min(each) <= max(each) < model.config.vocab_size:
                raise FieldError("prompt", f"token ids must lie between 0 and {model.config.vocab_size - 1}")
            prompts.append(each)
            texts.append(None)
        else:
            raise FieldError("prompt", expected)
    return prompts, texts


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def _sampling(fields: Fields, model: ServedModel, seed: int, logprobs: int | None) -> dict[str, Any]:
    """Arguments of `SamplingParams`, all but the length."""
    values: dict[str, Any] = {"n": 1, "seed": seed, "logprobs": logprobs, "ignore_eos": fields.flag("ignore_eos")}
    for name in _NUMBERS:
        if (number := fields.number(name)) is not None:
            values[name] = number
    for name in _INTEGERS:
        if (integer := fields.integer(name)) is not None:
            values[name] = integer
    if values["n"] > _MOST_SAMPLES:
        raise FieldError("n", f"is {values['n']}; at most {_MOST_SAMPLES}")
    if values.get("top_k") == -1:  # how vLLM says: all
        values["top_k"] = 0
    if (given := fields.integer("seed")) is not None:
        values["seed"] = given
    values["seed"] %= 2**32
    last = model.config.vocab_size - 1
    ids = fields.listing("stop_token_ids") or []
    if not _are_ids(ids) or not all(0 <= i <= last for i in ids):
        raise FieldError("stop_token_ids", f"must be a list of token ids, 0 to {last}")
    values["stop_token_ids"] = tuple(ids)
    values["stop"] = _stop(fields)
    values["structured_output"] = structured_output(fields)
    biases = {}
    for token, bias in (fields.mapping("logit_bias") or {}).items():
        if not token.isdecimal() or len(token) > 9 or int(token) > last:
            raise FieldError("logit_bias", f"has the key {token!r}; keys must be token ids, 0 to {last}")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise FieldError("logit_bias", f"of token {token} is {bias!r}; must be a number from -100 to 100")
        biases[int(token)] = float(bias)
    values["logit_bias"] = biases
    return values


def _build(values: Mapping[str, Any], max_tokens: int, max_name: str = "max_tokens") -> SamplingParams:
    try:
        return SamplingParams(**values, max_tokens=max_tokens)
    except ValueError as error:  # begins with the field's name
        text = str(error)
        name = next((n for n in (*values, "max_tokens") if text.startswith(n)), "body")
        raise FieldError(max_name if name == "max_tokens" else name, text.removeprefix(name).lstrip(": ")) from error


def _room(
    prompt: list[int], where: str, wanted: int | None, default: int | None, longest: int, name: str = "max_tokens"
) -> int:
    """Most tokens to write: as wanted, or else the default or what there is room for."""
    room = longest - len(prompt)
    if room < 1:
        raise FieldError(
            where, f"is {len(prompt)} tokens long, but prompt and completion together may have {longest}: shorten it"
        )
    if wanted is None:
        return room if default is None else min(default, room)
    if wanted > room:
        raise FieldError(
            name,
            f"is {wanted}, and the prompt {len(prompt)} tokens long, but together they may have {longest}: "
            f"ask for at most {room}, or shorten the prompt",
        )
    return wanted


def _stop(fields: Fields) -> tuple[str, ...]:
    stop = fields.any("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise FieldError("stop", "must be a string or a list of strings, none of them empty")
    if len(stops) > _MOST_STOP_STRINGS:
        raise FieldError("stop", f"has {len(stops)} strings; at most {_MOST_STOP_STRINGS}")
    return tuple(fields.unicode("stop", s) for s in stops)
