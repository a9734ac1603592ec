"""scripts/serve.py as a user runs it: wrong flags, serving, and SIGTERM under load."""

import json
import os
import signal
import socket
import threading
import time

import httpx
import pytest
from script_processes import error_of, run, start
from tiny_server import CONFIG, tiny_model

from ml.checkpoint.pretrained import save_workdir

FLAGS = ["--port=0", "--max_running=1", "--token_budget=16", "--decode_steps=1", "--nowarm_up"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    model = tiny_model()
    model.tokenizer.save(root)
    save_workdir(root / "run", CONFIG, model.params, root / "tokenizer.json")
    return root


def test_sigterm_under_load_lets_what_runs_end(folder):
    template = folder / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    more = [f"--chat_template={template}", "--served_model_name=small"]
    process = start("serve.py", f"--model={folder / 'run'}", *FLAGS, *more)
    try:
        process.wait_until(lambda: "http://" in process.stderr)
        assert "\nserving small on " in f"\n{process.stderr}", process.stderr
        address = process.stderr.split()[-1]
        answers, texts = [], []

        def ask():
            body = {"messages": [{"role": "user", "content": "Fünf"}], "max_tokens": 200, "ignore_eos": True}
            answers.append(httpx.post(f"{address}/v1/chat/completions", json=body, timeout=120))

        def stream():
            body = {"prompt": "Fünf", "max_tokens": 200, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=120) as answer:
                texts.extend(answer.iter_lines())

        threads = [threading.Thread(target=target) for target in (ask, ask, stream)]
        for thread in threads:
            thread.start()
        with httpx.Client(base_url=address, timeout=60) as client:
            while "num_requests_waiting 2.0" not in client.get("/metrics").text:
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGTERM)
            while (health := client.get("/health")).status_code == 200:
                time.sleep(0.01)
            assert health.status_code == 503
            refused = client.post("/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        for thread in threads:
            thread.join(120)
        assert [(a.status_code, a.json()["usage"]["completion_tokens"]) for a in answers] == [(200, 200)] * 2
        assert texts[-2] == "data: [DONE]" and json.loads(texts[-4][6:])["choices"][0]["finish_reason"] == "length"
        assert process.wait().returncode == 0
        assert "Traceback" not in process.stderr
    finally:
        process.kill()


def test_what_cannot_be_served_is_said_in_one_line(folder, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cases = {
            "--model is missing": [],
            "--model: ": [f"--model={tmp_path}"],
            "--port=": [f"--model={folder / 'run'}", f"--port={taken.getsockname()[1]}"],
            "max_length=10000 exceeds": [f"--model={folder / 'run'}", "--port=0", "--max_length=10000"],
            "--chat_template: /nowhere": [f"--model={folder / 'run'}", "--port=0", "--chat_template=/nowhere"],
            "--nowarm_up not to: give one": [f"--model={folder / 'run'}", "--nowarm_up", "--warm_up_for=logprobs"],
        }
        for wanted, arguments in cases.items():
            assert wanted in error_of(run("serve.py", *arguments))
