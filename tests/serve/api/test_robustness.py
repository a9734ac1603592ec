"""What clients should not do, over a real connection: every answer is an error in OpenAI's form, and nothing leaks."""

import contextlib
import json
import re
import socket
import threading
import time

import httpx
import pytest
from tiny_server import TinyServer

from ml.serve.sampling import SamplingParams

LONG = {"prompt": "Fünf", "max_tokens": 400, "ignore_eos": True}
SHORT = {"prompt": "Fünf", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def served():
    server = TinyServer(capacity=3, max_body=100_000, max_upload=200_000)
    with server.listening() as address, httpx.Client(base_url=address, timeout=60) as client:
        yield server, client


def error_of(answer, status):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"] and error["type"] and {"param", "code"} <= set(error)
    return error


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def idle(server):
    load = server.engine.load
    return not server.driver.unfinished and (load.running, load.waiting, load.held_pages) == (0, 0, 0)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"[1, 2]",
        b'"text"',
        b"null",
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": "hot"}',
        b'{"prompt": "x", "temperature": true}',
        b'{"prompt": "x", "max_tokens": 1.5}',
        b'{"prompt": "x", "max_tokens": -1}',
        b'{"prompt": "x", "max_tokens": 99999999999999999999999999999999999}',
        b'{"prompt": "x", "n": 99999999999}',
        b'{"prompt": "x", "logprobs": 21}',
        b'{"prompt": "x", "stop": [""]}',
        b'{"prompt": "x", "stop": {"a": 1}}',
        b'{"prompt": "x", "logit_bias": {"-1": 5}}',
        b'{"prompt": "x", "logit_bias": {"1": 1000}}',
        b'{"prompt": "x", "stream": "yes"}',
        b'{"prompt": "x", "stream": true, "stream_options": {"a": 1}}',
        b'{"prompt": {"a": 1}}',
        b'{"prompt": [1, "x"]}',
        b'{"prompt": [-1]}',
        b'{"prompt": [[]]}',
        b'{"prompt": null}',
        b'{"\\ud800": 1, "prompt": "x"}',
        b'{"prompt": "x", "top_k": 99999999999999999999}',
        b'{"prompt": "x", "min_tokens": 5, "max_tokens": 2}',
    ],
)
def test_a_bad_body_is_a_bad_request(served, body):
    server, client = served
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/v1/batches"):
        error_of(client.post(path, content=body, headers={"content-type": "application/json"}), 400)
    assert idle(server)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{}],
        [{"role": "king", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": "x" * 5000}],
    ],
)
def test_a_bad_conversation_is_a_bad_request(served, messages):
    error = error_of(served[1].post("/v1/chat/completions", json={"messages": messages}), 400)
    assert "messages" in error["param"] or "messages" in error["message"]


@pytest.mark.parametrize(
    "text", ["", "\0", "🎉👩‍👩‍👧‍👦", "\u202e", "ﷺ" * 20, "<|endoftext|>", "a\r\n\t", "\ufffd", "{{ 7 * 7 }}"]
)
def test_any_text_is_fine(served, text):
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
    assert served[1].post("/v1/chat/completions", json=body).status_code == 200
    assert served[1].post("/v1/completions", json={**SHORT, "prompt": text}).status_code == 200
    tokens = served[1].post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert served[1].post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}


def test_paths_and_methods_that_do_not_exist(served):
    _, client = served
    error_of(client.get("/v1/nothing"), 404)
    error_of(client.get("/v1/completions"), 405)
    error_of(client.delete("/health"), 405)
    error_of(client.get("/v1/files/file-x"), 404)
    error_of(client.get("/v1/files/file-x/content"), 404)
    error_of(client.get("/v1/batches/batch_x"), 404)
    error_of(client.post("/v1/batches/batch_x/cancel"), 404)
    body = {"input_file_id": "file-x", "endpoint": "/v1/completions"}
    error_of(client.post("/v1/batches", json=body), 404)
    assert error_of(client.post("/v1/completions", json={**SHORT, "model": "gpt-4"}), 404)["code"] == "model_not_found"
    error_of(client.get("/v1/files", params={"limit": 0}), 400)
    error_of(client.get("/v1/batches", params={"after": "batch_x"}), 400)
    error_of(client.post("/v1/files", files={"file": b"x"}, data={"purpose": "fine-tune"}), 400)
    error_of(client.post("/v1/files", json={}), 400)


def test_bodies_that_are_too_large(served):
    _, client = served
    error_of(client.post("/v1/completions", content=b"x" * 100_001), 413)
    error_of(client.post("/v1/completions", content=iter([b"[" * 60_000] * 2)), 413)  # says no length
    error_of(client.post("/v1/files", files={"file": b"x" * 300_000}, data={"purpose": "batch"}), 413)
    assert client.post("/v1/files", files={"file": b"x" * 150_000}, data={"purpose": "batch"}).status_code == 200


def test_a_client_that_leaves_mid_stream_frees_the_pages(served):
    server, client = served
    for path, body in (
        ("/v1/completions", LONG),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 400}),
    ):
        with client.stream("POST", path, json={**body, "stream": True, "n": 2}) as answer:
            lines = answer.iter_lines()
            for _ in range(3):
                next(lines)
            assert server.engine.load.held_pages
        until(lambda: idle(server))


def test_a_client_that_leaves_before_the_answer_frees_the_pages(served):
    server, client = served
    body = json.dumps({**LONG, "n": 2}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with contextlib.closing(socket.create_connection((client.base_url.host, client.base_url.port))) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        until(lambda: server.engine.load.held_pages)
    until(lambda: idle(server))


def test_a_full_queue_says_when_to_come_again(served):
    server, client = served
    with client.stream("POST", "/v1/completions", json={**LONG, "n": 3, "stream": True}) as answer:
        assert answer.status_code == 200
        refused = client.post("/v1/completions", json=SHORT)
        assert error_of(refused, 429)["code"] == "queue_full" and int(refused.headers["retry-after"]) >= 1
        assert error_of(client.post("/v1/completions", json={**SHORT, "stream": True}), 429)
        assert client.get("/health").status_code == 200
    until(lambda: idle(server))
    assert client.post("/v1/completions", json=SHORT).status_code == 200
    assert "split" in error_of(client.post("/v1/completions", json={**SHORT, "n": 4}), 400)["message"]


def test_a_step_that_fails_is_an_error_and_the_server_goes_on(served, monkeypatch):
    server, client = served
    whole = client.post("/v1/completions", json=SHORT).json()["choices"]
    failures = count_failures(client)
    runner = server.engine._runner
    run, calls = runner.run, []

    def fail(*args):
        calls.append(args)
        if len(calls) in (3, 5):
            raise RuntimeError("the device is gone")
        return run(*args)

    monkeypatch.setattr(runner, "run", fail)
    assert "engine failed" in error_of(client.post("/v1/completions", json=LONG), 500)["message"]
    events = client.post("/v1/completions", json={**LONG, "stream": True}).text.split("\n\n")
    assert "engine failed" in json.loads(events[-3].removeprefix("data: "))["error"]["message"]
    assert events[-2:] == ["data: [DONE]", ""]
    until(lambda: idle(server))
    assert client.post("/v1/completions", json=SHORT).json()["choices"] == whole
    assert count_failures(client) == failures + 2


def count_failures(client):
    return float(re.search(r"^megabatch_engine_failures_total (\S+)", client.get("/metrics").text, re.M)[1])


def test_metrics_count(served):
    _, client = served

    def read():
        lines = client.get("/metrics").text.splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}

    before = read()
    answer = client.post("/v1/completions", json={"prompt": "große Äpfel " * 12, "max_tokens": 5, "ignore_eos": True})
    usage = answer.json()["usage"]
    again = client.post("/v1/completions", json={"prompt": "große Äpfel " * 12, "max_tokens": 5, "ignore_eos": True})
    cached = again.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    after = read()
    change = {name: after[name] - before.get(name, 0) for name in after}
    assert usage["completion_tokens"] == 5 and cached >= 16
    assert change["megabatch_generation_tokens_total"] == 10
    assert change["megabatch_prompt_tokens_total"] == 2 * usage["prompt_tokens"]
    assert change["megabatch_prefix_cache_hits_total"] == cached
    assert change["megabatch_time_to_first_token_seconds_count"] == 2
    assert change["megabatch_inter_token_latency_seconds_count"] == 8
    assert change['megabatch_request_total{finished_reason="length"}'] == 2
    assert after["megabatch_num_requests_running"] == after["megabatch_num_requests_waiting"] == 0
    assert change["megabatch_compilations_total"] == 0


def test_a_request_that_takes_too_long_ends():
    server = TinyServer(request_timeout=0.3)
    server.engine.generate([server.model.encode(LONG["prompt"])], SamplingParams(max_tokens=9))  # compiles
    step = server.engine.step

    def slow():
        time.sleep(0.02)
        return step()

    server.engine.step = slow
    with server.listening() as address, httpx.Client(base_url=address, timeout=60) as client:
        assert error_of(client.post("/v1/completions", json=LONG), 504)["code"] == "timeout"
        events = client.post("/v1/completions", json={**LONG, "stream": True}).text.split("\n\n")
        assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "timeout"
        until(lambda: idle(server))


def test_a_slow_reader_gets_all_and_stops_nobody(served):
    server, client = served
    body = {**LONG, "temperature": 0}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        until(lambda: idle(server))  # all is written, of which next to nothing was read
        got = [json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {")]
    assert whole.endswith("".join(got)) and len("".join(got)) > len(whole) - 50


def test_many_clients_at_once_all_get_an_answer(served):
    server, client = served
    statuses = []

    def ask(i):
        body = {**SHORT, "max_tokens": 3 + i % 5}
        while (answer := client.post("/v1/completions", json=body)).status_code == 429:
            time.sleep(0.02)
        statuses.append((answer.status_code, answer.json()["usage"]["completion_tokens"] <= 3 + i % 5))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [(200, True)] * 24
    until(lambda: idle(server))
