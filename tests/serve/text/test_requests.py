"""OpenAI's bodies: what they become, and that whatever is wrong in them is said of its field."""

import json
import math

import pytest
from text_model import text_model

from ml.serve.grammar import StructuredOutput
from ml.serve.sampling import SamplingParams
from ml.serve.text.fields import FieldError
from ml.serve.text.requests import check_model, read_chat, read_completion, reader

MODEL = text_model()
USER = {"role": "user", "content": "Äpfel"}


def _completion(**body):
    return read_completion({"prompt": "Äpfel", **body}, MODEL)


def _chat(**body):
    return read_chat({"messages": [USER], **body}, MODEL)


def test_what_is_left_out_has_openais_defaults():
    request = _completion()
    assert request.prompts == (MODEL.encode("Äpfel"),)
    assert request.sampling == (SamplingParams(max_tokens=16),)
    assert (request.chat, request.include_stop, request.echo) == (False, False, ())
    chat = _chat()
    assert chat.chat
    assert chat.prompts == (MODEL.encode_chat([USER]),)
    assert chat.sampling[0].max_tokens == 64 - len(chat.prompts[0])  # all the room that there is
    nothing = dict.fromkeys(("max_tokens", "temperature", "n", "stop", "logit_bias", "seed", "echo", "stream"))
    assert _completion(**nothing) == request


def test_every_parameter_arrives():
    given = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "seed": 7,
        "ignore_eos": True,
        "n": 3,
        "logprobs": 2,
    }
    expected = SamplingParams(**given, logit_bias={5: -100.0}, stop_token_ids=(1, 2), stop=("a",))
    request = _completion(**given, logit_bias={"5": -100}, stop_token_ids=[1, 2], stop=["a"])
    assert request.sampling == (expected,)
    assert _completion(stop=["a", "€"], best_of=3).sampling[0] == SamplingParams(16, stop=("a", "€"), best_of=3)
    chat = _chat(**{**given, "logprobs": True}, top_logprobs=2, logit_bias={"5": -100}, stop_token_ids=[1, 2], stop="a")
    assert chat.sampling == (expected,)
    assert _chat(max_completion_tokens=4, max_tokens=9).sampling[0].max_tokens == 4
    assert _completion(seed=-1).sampling[0].seed == 2**32 - 1
    assert _completion(top_k=-1).sampling[0].top_k == 0
    assert read_completion({"prompt": "x"}, MODEL, seed=5).sampling[0].seed == 5


def test_structured_outputs_of_openai_and_vllm():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for read in (_completion, _chat):
        for body, wanted in (
            ({"response_format": {"type": "text"}}, None),
            ({"response_format": {"type": "json_object"}}, StructuredOutput(json_object=True)),
            (
                {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
                StructuredOutput(json_schema=schema),
            ),
            ({"structured_outputs": {"json": schema}}, StructuredOutput(json_schema=schema)),
            ({"structured_outputs": {"regex": "a+"}}, StructuredOutput(regex="a+")),
            ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutput(choice=("a", "b"))),
        ):
            assert read(**body).sampling[0].structured_output == wanted


def test_prompts_in_all_their_forms():
    ids = MODEL.encode("Äpfel")
    assert _completion(prompt=["Äpfel", "x"]).prompts == (ids, MODEL.encode("x"))
    assert _completion(prompt=[1, 2]).prompts == ([1, 2],)
    assert _completion(prompt=[[1, 2], [3]]).prompts == ([1, 2], [3])
    assert _completion(prompt="").prompts == (MODEL.opening,)
    # Two prompts that are alike need not have the same text.
    assert [s.seed for s in _completion(prompt=["a", "a"], n=3, seed=1).sampling] == [1, 4]
    assert _completion(prompt=["Äpfel", "x"], echo=True).echo == ("Äpfel", "x")


def test_the_log_probabilities_of_an_echoed_prompt_are_computed_too():
    def asked(**body):
        (sampling,) = _completion(prompt="x", **body).sampling
        return sampling.logprobs, sampling.prompt_logprobs

    assert [asked(echo=True, logprobs=2), asked(logprobs=2), asked(echo=True)] == [(2, 2), (2, None), (None, None)]


def test_the_length_is_cut_only_where_it_was_not_asked_for():
    long = [1] * 60
    assert _completion(prompt=long).sampling[0].max_tokens == 4
    with pytest.raises(FieldError, match=r"max_tokens: is 5, and the prompt 60 tokens.*at most 4"):
        _completion(prompt=long, max_tokens=5)
    with pytest.raises(FieldError, match=r"prompt: is 64 tokens long.*64: shorten"):
        _completion(prompt=[1] * 64)
    with pytest.raises(FieldError, match=r"messages: is \d+ tokens long"):
        _chat(messages=[{"role": "user", "content": "x" * 200}])
    with pytest.raises(FieldError, match="max_completion_tokens: is 64"):
        _chat(max_completion_tokens=64)
    assert read_completion({"prompt": "x"}, MODEL, max_length=10).sampling[0].max_tokens < 10


def test_messages_reach_the_template_as_it_expects_them():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert _chat(messages=[{"role": "user", "content": parts}]) == _chat(messages=[{"role": "user", "content": "a\nb"}])
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "<é>"}'}}
    shown = text_model("{{ messages[1].content }}|{{ messages[1].tool_calls[0].function.arguments | tojson }}")
    asked = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    prompt = read_chat({"messages": asked}, shown).prompts[0]
    assert shown.tokenizer.decode(prompt) == '|{"x": "<é>"}'
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert json.dumps([tool]) in MODEL.tokenizer.decode(_chat_text(tools=[tool]))
    assert _chat(tools=[tool], tool_choice="none") == _chat(tools=[]) == _chat()
    assert "glad" in MODEL.tokenizer.decode(_chat_text(chat_template_kwargs={"mood": "glad"}))
    assert _chat(add_generation_prompt=False).prompts != _chat().prompts


def _chat_text(**body):
    return read_chat({"messages": [USER], **body}, MODEL, max_length=1000).prompts[0]


SURROGATE = json.loads('"\\ud83d"')
WRONG = [
    ({"temprature": 1}, "temprature: there is no such field; did you mean 'temperature'"),
    ({"temperature": "hot"}, "temperature: is 'hot'; must be a number"),
    ({"temperature": True}, "temperature: is True; must be a number"),
    ({"temperature": -1}, "temperature=-1.0: must be 0"),
    ({"temperature": math.nan}, "temperature=nan: must be 0"),
    ({"temperature": 10**400}, "temperature: is beyond"),
    ({"top_p": 0}, "top_p=0.0: must be above 0"),
    ({"top_k": 1.5}, "top_k: is 1.5; must be a whole number"),
    ({"min_p": 2}, "min_p=2.0: must lie between"),
    ({"presence_penalty": 3}, "presence_penalty=3.0: must lie between -2 and 2"),
    ({"n": 0}, "n=0: must be at least 1"),
    ({"n": 10**6}, "n: is 1000000; at most 1024"),
    ({"seed": "x"}, "seed: is 'x'; must be a whole number"),
    ({"max_tokens": 0}, "max_tokens=0: must be at least 1"),
    ({"max_tokens": -5}, "max_tokens=-5: must be at least 1"),
    ({"min_tokens": 17, "max_tokens": 16}, "min_tokens=17: must lie between 0 and max_tokens=16"),
    ({"stop": [""]}, "stop: must be a string or a list of strings, none of them empty"),
    ({"stop": 5}, "stop: must be a string"),
    ({"stop": ["x"] * 17}, "stop: has 17 strings; at most 16"),
    ({"stop": SURROGATE}, "stop: holds .* half of a surrogate pair"),
    ({"stop_token_ids": [300]}, "stop_token_ids: must be a list of token ids, 0 to 299"),
    ({"logit_bias": {"x": 1}}, "logit_bias: has the key 'x'; keys must be token ids, 0 to 299"),
    ({"logit_bias": {"300": 1}}, "logit_bias: has the key '300'"),
    ({"logit_bias": {"5": "1"}}, "logit_bias: of token 5 is '1'; must be a number"),
    ({"logit_bias": {"5": 101}}, r"logit_bias\[5\]=101.0"),
    ({"logit_bias": [1]}, r"logit_bias: is \[1\]; must be an object"),
    ({"response_format": {"type": "xml"}}, "response_format: type is 'xml'; must be one of text, json_object, json"),
    ({"response_format": {"type": "json_schema"}}, "response_format: json_schema must be"),
    ({"response_format": "json"}, "response_format: is 'json'; must be an object"),
    ({"structured_outputs": {"xml": "x"}}, "structured_outputs: has 'xml'; must be one of json, json_object, regex"),
    ({"structured_outputs": {}}, "structured_outputs: has none of its fields"),
    ({"structured_outputs": {"regex": 5}}, "structured_outputs: "),
    ({"structured_outputs": {"choice": [5]}}, "structured_outputs: "),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}}, "structured_outputs: does not go"),
    ({"ignore_eos": 1}, "ignore_eos: is 1; must be true or false"),
]
WRONG_COMPLETIONS = [
    ({"prompt": None}, "prompt: is missing"),
    ({"prompt": []}, "prompt: is an empty list; must be a string"),
    ({"prompt": {}}, "prompt: must be a string, a list of strings"),
    ({"prompt": ["a", 1]}, "prompt: must be a string, a list of strings"),
    ({"prompt": [[]]}, "prompt: must be a string, a list of strings"),
    ({"prompt": [True]}, "prompt: must be a string, a list of strings"),
    ({"prompt": [-1]}, "prompt: token ids must lie between 0 and 299"),
    ({"prompt": [300]}, "prompt: token ids must lie between 0 and 299"),
    ({"prompt": SURROGATE}, "prompt: holds .* half of a surrogate pair"),
    ({"logprobs": 21}, "logprobs=21: must lie between 0 and 20"),
    ({"logprobs": True}, "logprobs: is True; must be a whole number"),
    ({"best_of": 2, "n": 3}, "best_of=2: must be at least n=3"),
    ({"best_of": 10**9}, "best_of: is 1000000000; at most 1024"),
    ({"best_of": 2, "stream": True}, "best_of: does not go together with stream"),
    ({"suffix": "x"}, "suffix: is not supported"),
    ({"messages": []}, "messages: there is no such field"),
]
WRONG_CHATS = [
    ({"messages": None}, "messages: is missing"),
    ({"messages": []}, "messages: is an empty list"),
    ({"messages": "hi"}, "messages: is 'hi'; must be a list"),
    ({"messages": ["hi"]}, r"messages\[0\]: must be an object"),
    (
        {"messages": [USER, {"role": "bot", "content": "x"}]},
        r"messages\[1\].role: is 'bot'; must be one of sys",
    ),
    ({"messages": [{"role": "user"}]}, r"messages\[0\].content: is missing"),
    ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\].content: must be a string"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"messages\[0\].content\[0\]: must be"),
    ({"messages": [{"role": "user", "content": SURROGATE}]}, r"messages\[0\].content: holds"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, r"messages\[0\].tool_calls\[0\]: must be"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages: the model's chat template refuses.*cannot begin"),
    ({"tools": [{"type": "x"}]}, r"tools\[0\] must be"),
    ({"tool_choice": "required"}, 'tool_choice: must be "auto" or "none"'),
    ({"top_logprobs": 3}, "top_logprobs: needs logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs=21: must lie between 0 and 20"),
    ({"logprobs": 2}, "logprobs: is 2; must be true or false"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs: 'messages' is a field of its own"),
    ({"modalities": ["audio"]}, "modalities: must be"),
]


@pytest.mark.parametrize(("body", "message"), [*WRONG, *WRONG_COMPLETIONS])
def test_completions_refuse(body, message):
    with pytest.raises(FieldError, match=f"^{message}") as error:
        _completion(**body)
    assert error.value.field.split("[")[0] in body


@pytest.mark.parametrize(("body", "message"), [*WRONG, *WRONG_CHATS])
def test_chats_refuse(body, message):
    with pytest.raises(FieldError, match=f"^{message}") as error:
        _chat(**body)
    assert error.value.field.split("[")[0] in {*body, "top_logprobs"}


def test_a_chat_needs_a_template():
    with pytest.raises(FieldError, match=r"messages: the model 'small' has no chat template.*--chat_template=FILE"):
        read_chat({"messages": [USER]}, text_model(chat=None))


def test_paths_and_models():
    assert reader("/v1/completions") is read_completion
    assert reader("/v1/chat/completions") is read_chat
    for url in ("/v1/nothing", None, 5):
        with pytest.raises(FieldError, match=r"url: is .*; must be one of /v1/completions, /v1/chat/completions"):
            reader(url)
    check_model({}, MODEL)
    check_model({"model": "small"}, MODEL)
    with pytest.raises(FieldError, match="model: is 'gpt', but 'small' is what runs here"):
        check_model({"model": "gpt"}, MODEL)
