"""The official client, unchanged, against a real server: everything that it offers and we serve."""

import base64
import json
import time

import numpy as np
import openai
import pytest
from tiny_server import TinyServer

GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def served():
    server = TinyServer(api_key="secret")
    with server.listening() as address:
        yield server, address


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served[1]}/v1", api_key="secret", max_retries=0) as client:
        yield client


def expected(served, prompt, max_tokens=12):
    """Greedy tokens, without any server or cache."""
    import jax.numpy as jnp

    from ml.models import Transformer

    model = served[0].model
    tokens = list(prompt)
    for _ in range(max_tokens):
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = _forward(Transformer(model.config), model.params, jnp.asarray(padded))
        tokens.append(int(logits[0, len(tokens) - 1].argmax()))
        if tokens[-1] in model.stop_ids:
            tokens.pop()
            break
    return tokens[len(prompt) :]


def _forward(model, params, tokens):
    import jax

    global _jitted
    _jitted = globals().get("_jitted") or jax.jit(
        lambda model, params, tokens: model.apply({"params": params}, tokens, method="forward"), static_argnums=0
    )
    return _jitted(model, params, tokens)


def test_a_completion_is_the_models_text(served, client):
    model = served[0].model
    answer = client.completions.create(prompt="Äpfel für", **GREEDY)
    prompt = model.encode("Äpfel für")
    tokens = expected(served, prompt)
    assert answer.choices[0].text == model.tokenizer.decode(prompt + tokens)[len("Äpfel für") :]
    assert answer.choices[0].finish_reason == "length" and answer.model == "tiny"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")


@pytest.mark.parametrize("prompt", [["3 €", "Fünf große"], [1, 2, 3], [[1, 2, 3], [4, 5]]])
def test_every_form_of_prompt(served, client, prompt):
    model = served[0].model
    answer = client.completions.create(prompt=prompt, n=2, echo=True, **GREEDY)
    many = [prompt] if isinstance(prompt[0], int) else prompt
    assert [choice.index for choice in answer.choices] == list(range(2 * len(many)))
    for i, each in enumerate(many):
        text = each if isinstance(each, str) else model.tokenizer.decode(each)
        first, second = answer.choices[2 * i : 2 * i + 2]
        assert first.text.startswith(text) and first.text == second.text and len(first.text) > len(text)


def test_samples_differ_and_a_seed_gives_them_again(client):
    def texts(**more):
        answer = client.completions.create(model="tiny", prompt="große", max_tokens=8, n=3, **more)
        return [choice.text for choice in answer.choices]

    assert len(set(texts(seed=5))) == 3 and texts(seed=5) == texts(seed=5)
    assert texts() != texts()  # without one, every request has its own


def test_the_best_of_several_is_given_alone(client):
    def ask(**more):
        return client.completions.create(model="tiny", prompt="große", max_tokens=8, seed=5, logprobs=2, **more).choices

    samples = ask(n=3)
    likeliest = max(samples, key=lambda c: sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs))
    assert [choice.text for choice in ask(best_of=3)] == [likeliest.text]
    with pytest.raises(openai.BadRequestError, match="best_of"):
        ask(best_of=3, stream=True)


def test_a_streamed_text_is_the_whole_text(client):
    whole = client.completions.create(prompt="naïve 漢字", n=2, logprobs=2, **GREEDY)
    options = {"include_usage": True}
    chunks = list(
        client.completions.create(prompt="naïve 漢字", n=2, logprobs=2, stream=True, stream_options=options, **GREEDY)
    )
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 4
    for index, choice in enumerate(whole.choices):
        mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == index]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine if c.finish_reason] == [mine[-1].finish_reason] == ["length"]
        given = [c.logprobs for c in mine if c.logprobs]
        assert [t for g in given for t in g.tokens] == choice.logprobs.tokens
        np.testing.assert_allclose(
            [p for g in given for p in g.token_logprobs], choice.logprobs.token_logprobs, atol=1e-4
        )
        assert [o for g in given for o in g.text_offset] == choice.logprobs.text_offset


def test_log_probabilities_are_the_models(served, client):
    model = served[0].model
    answer = client.completions.create(prompt="3 €", logprobs=2, **GREEDY)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 12
    prompt = model.encode("3 €")
    tokens = expected(served, prompt)
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(prompt) + 12] = prompt + tokens
    from ml.models import Transformer

    logits = np.asarray(_forward(Transformer(model.config), model.params, padded)[0], np.float64)
    wanted = [
        logits[len(prompt) - 1 + i, token] - np.logaddexp.reduce(logits[len(prompt) - 1 + i])
        for i, token in enumerate(tokens)
    ]
    np.testing.assert_allclose(logprobs.token_logprobs, wanted, atol=1e-4)
    for best, given in zip(logprobs.top_logprobs, logprobs.token_logprobs, strict=True):
        assert max(best.values()) == given and len(best) <= 2  # greedy: what was drawn is the likeliest


def test_log_probabilities_of_an_echoed_prompt(served, client):
    """As evaluation harnesses ask for them."""
    from ml.models import Transformer

    model = served[0].model
    prompt = model.encode("Was kosten 3 €?")
    ask = {"prompt": prompt, "echo": True, "logprobs": 2, "model": "tiny", "temperature": 0, "max_tokens": 1, "n": 2}
    choices = client.completions.create(**ask).choices
    tokens = [*prompt, *expected(served, prompt, 1)]
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(_forward(Transformer(model.config), model.params, padded)[0], np.float64)
    wanted = [logits[i, token] - np.logaddexp.reduce(logits[i]) for i, token in enumerate(tokens[1:])]
    chunks = list(client.completions.create(**ask, stream=True))
    for choice in choices:
        assert choice.text == model.tokenizer.decode(tokens)
        assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
        np.testing.assert_allclose(choice.logprobs.token_logprobs[1:], wanted, atol=1e-4)
        assert [max(top.values()) for top in choice.logprobs.top_logprobs[1:]] == pytest.approx(
            [row.max() - np.logaddexp.reduce(row) for row in logits[: len(tokens) - 1]], abs=1e-4
        )
        mine = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        given = [p for c in mine if c.logprobs for p in c.logprobs.token_logprobs]
        assert given[0] is None and given[1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-4)


def test_a_stop_string_ends_the_text_before_it(client):
    whole = client.completions.create(prompt="Fünf", **GREEDY).choices[0].text
    stop = whole[4:6]
    for answer in (
        client.completions.create(prompt="Fünf", stop=[stop], **GREEDY),
        client.completions.create(prompt="Fünf", stop=stop, n=2, **GREEDY),
    ):
        for choice in answer.choices:
            assert choice.text == whole[: whole.index(stop)] and choice.finish_reason == "stop"
    chunks = list(client.completions.create(prompt="Fünf", stop=[stop], stream=True, **GREEDY))
    assert "".join(c.choices[0].text for c in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


MESSAGES = [{"role": "system", "content": "Kurz."}, {"role": "user", "content": "Was kosten fünf Äpfel? 🎉"}]


def test_a_chat_whole_and_streamed(served, client):
    model = served[0].model
    more = {"model": "tiny", "temperature": 0, "max_completion_tokens": 12, "logprobs": True, "top_logprobs": 2}
    answer = client.chat.completions.create(messages=MESSAGES, user="me", metadata={"a": "b"}, store=False, **more)
    message, logprobs = answer.choices[0].message, answer.choices[0].logprobs
    tokens = expected(served, model.encode_chat(MESSAGES))
    assert message.role == "assistant" and len(logprobs.content) == 12
    assert answer.object == "chat.completion" and answer.usage.completion_tokens == 12
    assert [e.token for e in logprobs.content] == [model.tokenizer.decode([t], skip_special=False) for t in tokens]
    assert all(len(e.top_logprobs) == 2 and e.top_logprobs[0].logprob == e.logprob for e in logprobs.content)
    chunks = list(client.chat.completions.create(messages=MESSAGES, stream=True, **more))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == message.content
    assert sum(len(c.choices[0].logprobs.content) for c in chunks if c.choices[0].logprobs) == 12
    with client.chat.completions.stream(messages=MESSAGES, model="tiny", temperature=0, max_tokens=12) as stream:
        assert "".join(e.delta for e in stream if e.type == "content.delta") == message.content


def test_embeddings_are_the_normalized_mean_of_hidden_states(served, client):
    from ml.models import Transformer

    model = served[0].model
    texts = ["3 €", "Fünf große Äpfel, naïve 漢字 🎉 und mehr", "3 €"]
    answer = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    vectors = np.array([each.embedding for each in answer.data])
    ids = model.encode(texts[1])
    hidden = Transformer(model.config).apply({"params": model.params}, np.array([ids], np.int32))[0]
    mean = np.asarray(hidden)[0].mean(axis=0)
    np.testing.assert_allclose(vectors[1], mean / np.linalg.norm(mean), atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)
    assert answer.usage.prompt_tokens == sum(len(model.encode(text)) for text in texts)
    packed = client.embeddings.create(model="tiny", input=ids)  # the client asks for base64 by itself
    np.testing.assert_allclose(packed.data[0].embedding, vectors[1], atol=1e-5)
    raw = client.embeddings.with_raw_response.create(model="tiny", input=ids, encoding_format="base64")
    data = json.loads(raw.text)["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(data), "<f4"), vectors[1], atol=1e-5)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "megabatch"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt/4")


def test_a_batch_from_upload_to_result(client):
    prompts = ["3 €", "Fünf", "große Äpfel"]
    lines = [
        {"custom_id": f"line {i}", "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt, **GREEDY}}
        for i, prompt in enumerate(prompts)
    ]
    lines.append({**lines[0], "custom_id": "bad", "body": {"prompt": "x", "temperature": -1}})
    text = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("job.jsonl", text), purpose="batch")
    assert file.bytes == len(text) and file.filename == "job.jsonl"
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata={"a": "b"}
    )
    batch = wait(client, batch)
    assert batch.status == "completed" and batch.metadata == {"a": "b"}
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (4, 3, 1)
    results = {r["custom_id"]: r for r in map(json.loads, client.files.content(batch.output_file_id).text.splitlines())}
    for i, prompt in enumerate(prompts):
        body = results[f"line {i}"]["response"]["body"]
        assert body["choices"][0]["text"] == client.completions.create(prompt=prompt, **GREEDY).choices[0].text
    (error,) = map(json.loads, client.files.content(batch.error_file_id).text.splitlines())
    assert error["custom_id"] == "bad" and error["response"]["status_code"] == 400
    assert error["response"]["body"]["error"]["param"] == "temperature"
    assert batch.id in [each.id for each in client.batches.list()]
    assert {file.id, batch.output_file_id} <= {each.id for each in client.files.list()}
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_a_damaged_batch_fails_with_the_lines_that_are_wrong(client):
    text = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}\nnonsense\n'
    file = client.files.create(file=("job.jsonl", text), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    batch = wait(client, batch)
    assert batch.status == "failed" and [error.line for error in batch.errors.data] == [2]


def test_a_cancelled_batch_keeps_what_it_has(served, client):
    body = {"prompt": "Fünf", "model": "tiny", "max_tokens": 400, "ignore_eos": True}
    lines = [{"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body} for i in range(200)]
    file = client.files.create(file=("job.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    while client.batches.retrieve(batch.id).status == "validating":
        time.sleep(0.01)
    assert client.batches.cancel(batch.id).status == "cancelling"
    assert wait(client, batch).status == "cancelled"
    while served[0].driver.unfinished:
        time.sleep(0.01)
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def wait(client, batch):
    while batch.status not in ("completed", "failed", "cancelled"):
        time.sleep(0.02)
        batch = client.batches.retrieve(batch.id)
    return batch


@pytest.mark.parametrize(
    ("body", "kind", "param"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 10**9}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"n": 1000}, openai.BadRequestError, None),
        ({"prompt": "x" * 100_000}, openai.BadRequestError, "prompt"),
        ({"prompt": []}, openai.BadRequestError, "prompt"),
        ({"prompt": [10**6]}, openai.BadRequestError, "prompt"),
        ({"suffix": "end"}, openai.BadRequestError, "suffix"),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature"),
        ({"seed": "five"}, openai.BadRequestError, "seed"),
    ],
)
def test_errors_are_those_that_the_client_knows(client, body, kind, param):
    with pytest.raises(kind) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "x", **body})
    assert caught.value.param == param and caught.value.body["message"] and caught.value.type


def test_a_wrong_key_is_refused(served):
    with (
        openai.OpenAI(base_url=f"{served[1]}/v1", api_key="guess", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
