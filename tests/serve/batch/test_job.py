"""Jobs: every line answered once, whatever is wrong with others and wherever the job was stopped."""

import io
import json
import random
import sys
from pathlib import Path

import pytest
import rich.console
from scripted_engine import ScriptedEngine

from ml.errors import UserError
from ml.serve.batch import Job

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "text"))
from text_model import text_model

MODEL = text_model()


def _line(name, **body):
    body = {"prompt": f"Äpfel {name}", "max_tokens": 12, **body}
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}


def _chat(name, content="große", **body):
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 6, **body}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def _write(path, lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def _read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _run(source, output, engine=None, errors=None, **options):
    shown = io.StringIO()
    console = rich.console.Console(file=shown, width=1000)
    result = Job(MODEL, source, output, errors).run(engine or ScriptedEngine(), console=console, **options)
    return result, shown.getvalue()


def _texts(path):
    return {
        each["custom_id"]: [c.get("text", c.get("message")) for c in each["response"]["body"].get("choices", [])]
        for each in _read(path)
    }


def test_answers_are_openais(tmp_path):
    lines = [
        _line("plain"),
        _line("many", prompt=["a", "bc"], n=2, logprobs=1, echo=False),
        _chat("chat", logprobs=True, top_logprobs=2),
        _line("echo", echo=True, model="small"),
        _line("evaluated", echo=True, logprobs=1, n=2),
    ]
    source = _write(tmp_path / "in.jsonl", lines)
    result, shown = _run(source, tmp_path / "out.jsonl")
    assert (result.counts.answered, result.counts.failed, result.interrupted) == (5, 0, False)
    assert "5 requests answered, 0 failed" in shown
    records = {each["custom_id"]: each for each in _read(tmp_path / "out.jsonl")}
    for record in records.values():
        assert set(record) == {"id", "custom_id", "response", "error"}
        assert record["error"] is None
        assert record["response"]["status_code"] == 200
        assert record["response"]["request_id"]
        assert record["response"]["body"]["model"] == "small"
    plain = records["plain"]["response"]["body"]
    assert plain["object"] == "text_completion"
    assert plain["usage"] == {
        "prompt_tokens": len(MODEL.encode("Äpfel plain")),
        "completion_tokens": 12,
        "total_tokens": len(MODEL.encode("Äpfel plain")) + 12,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    (choice,) = plain["choices"]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert len(choice["text"]) == 12
    many = records["many"]["response"]["body"]
    assert [c["index"] for c in many["choices"]] == [0, 1, 2, 3]
    assert len({c["text"] for c in many["choices"]}) == 4
    assert many["usage"]["prompt_tokens"] == len(MODEL.encode("a")) + len(MODEL.encode("bc"))
    assert many["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
    given = many["choices"][0]["logprobs"]
    assert "".join(given["tokens"]) == many["choices"][0]["text"]
    assert given["token_logprobs"] == [-0.5] * len(given["tokens"])
    assert given["text_offset"] == list(range(len(given["tokens"])))
    assert given["top_logprobs"][0] == {MODEL.tokenizer.decode([66]): -0.25, given["tokens"][0]: -0.5}
    chat = records["chat"]["response"]["body"]
    assert chat["object"] == "chat.completion"
    (choice,) = chat["choices"]
    assert choice["message"]["role"] == "assistant"
    first = choice["logprobs"]["content"][0]
    assert first["token"] == choice["message"]["content"][0]
    assert first["bytes"] == [ord(first["token"])]
    assert [top["logprob"] for top in first["top_logprobs"]] == [-0.25, -0.5]
    assert records["echo"]["response"]["body"]["choices"][0]["text"].startswith("Äpfel echo")
    prompt = MODEL.encode("Äpfel evaluated")
    for choice in records["evaluated"]["response"]["body"]["choices"]:
        assert choice["text"].startswith("Äpfel evaluated")
        given = choice["logprobs"]
        assert given["tokens"][: len(prompt)] == [MODEL.tokenizer.decode([i], skip_special=False) for i in prompt]
        assert given["token_logprobs"][: len(prompt)] == [None, *(-0.125 * i for i in range(1, len(prompt)))]
        assert given["top_logprobs"][:2] == [None, {MODEL.tokenizer.decode([65]): -0.0625}]
        written = len(given["tokens"]) - len(prompt)
        assert written > 0 and given["token_logprobs"][len(prompt) :] == [-0.5 - choice["index"]] * written
        assert len({len(each) for each in given.values()}) == 1


def test_a_text_ends_at_a_stop_string_or_token(tmp_path):
    free = _write(tmp_path / "free.jsonl", [_line(f"{i}", seed=i, prompt="x", max_tokens=40) for i in range(40)])
    _run(free, tmp_path / "free_out.jsonl")
    whole = {k: v[0] for k, v in _texts(tmp_path / "free_out.jsonl").items()}
    lines = [_line(f"{i}", seed=i, prompt="x", max_tokens=40, stop=["b", "q"]) for i in range(40)]
    engine = ScriptedEngine()
    _run(_write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", engine)
    reasons = set()
    for record in _read(tmp_path / "out.jsonl"):
        (choice,) = record["response"]["body"]["choices"]
        ends = [whole[record["custom_id"]].find(stop) for stop in "bq"]
        end = min((e for e in ends if e >= 0), default=len(whole[record["custom_id"]]))
        assert choice["text"] == whole[record["custom_id"]][:end]
        reasons.add((choice["finish_reason"], any(e >= 0 for e in ends)))
        if any(e >= 0 for e in ends):
            assert record["response"]["body"]["usage"]["completion_tokens"] == end + 1
    assert ("stop", True) in reasons
    assert ("length", True) not in reasons
    assert len(engine.cancelled) > 10


def test_each_wrong_line_gets_its_own_error_and_the_others_their_answers(tmp_path):
    wrong = {
        2: ("{not json\n", "malformed JSON", None),
        3: ("[1]\n", "not an object", None),
        4: (json.dumps({"method": "POST"}) + "\n", "custom_id: is missing", None),
        6: (_line("a"), "custom_id: 'a' is that of line 1 already", "a"),
        7: ({**_line("get"), "method": "GET"}, "method: is 'GET'", "get"),
        8: ({**_line("url"), "url": "/v1/nothing"}, "url: is '/v1/nothing'; must be one of", "url"),
        9: (_line("hot", temperature="hot"), "temperature: is 'hot'; must be a number", "hot"),
        10: (_line("other", model="gpt"), "model: is 'gpt', but 'small'", "other"),
        11: (_line("stream", stream=True), "stream: must be false", "stream"),
        12: (_line("long", prompt=[1] * 51, max_tokens=1), "too long for the cache", "long"),
        13: (_line("two", prompt=["x", [1] * 51], max_tokens=1), "too long for the cache", "two"),
        14: ({**_line("body"), "body": 5}, "body: is 5", "body"),
        15: (
            _chat("role", model=None, messages=[{"role": "bot", "content": "x"}]),
            "messages[0].role: is 'bot'",
            "role",
        ),
        16: (json.dumps(_line("half")).replace("half", "\\ud800") + "\n", "custom_id: holds half", None),
    }
    lines = [_line("a"), *(wrong[i][0] for i in (2, 3, 4)), "  \n", *(wrong[i][0] for i in range(6, 17)), _line("z")]
    source = _write(tmp_path / "in.jsonl", lines)
    engine = ScriptedEngine()
    result, shown = _run(source, tmp_path / "out.jsonl", engine)
    assert (result.counts.answered, result.counts.failed) == (2, len(wrong))
    assert not engine.unfinished
    records = _read(tmp_path / "out.jsonl")
    assert {r["custom_id"] for r in records if r["error"] is None} == {"a", "z"}
    failed = {int(r["error"]["message"].split(":")[1]): r for r in records if r["error"] is not None}
    assert failed.keys() == wrong.keys()
    for number, (_, message, name) in wrong.items():
        assert failed[number]["error"]["message"].startswith(f"{source}:{number}: ")
        assert message in failed[number]["error"]["message"]
        assert failed[number]["custom_id"] == name
        assert failed[number]["response"]["status_code"] == 400
        assert message in failed[number]["response"]["body"]["error"]["message"]
    assert failed[9]["response"]["body"]["error"]["param"] == "temperature"
    assert f"error: {source}:2: malformed JSON" in shown
    assert shown.count("error: ") == 5  # then no more of them
    assert "2 requests answered, 14 failed" in shown
    # All that is done: nothing is done again.
    again, _ = _run(source, tmp_path / "out.jsonl")
    assert (again.counts.before, again.counts.answered, again.counts.failed) == (16, 0, 0)
    assert _read(tmp_path / "out.jsonl") == records


def test_one_wrong_request_does_not_keep_a_job_from_being_planned_or_answered(tmp_path):
    lines = [_line("a"), _line("b", prompt=["x", [1] * 51], max_tokens=1), _line("c", temperature="x"), _line("d")]
    engine = ScriptedEngine(schedule="planned")
    result, _ = _run(_write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", engine)
    assert (result.counts.answered, result.counts.failed, engine.planned) == (2, 2, 2)
    assert not engine.unfinished


def test_the_best_of_several(tmp_path):
    lines = [
        _line("a", prompt=["x", "y"], n=2, best_of=4, max_tokens=6),
        _line("b", prompt=["x", "y"], n=4, max_tokens=6),
    ]
    _run(_write(tmp_path / "in.jsonl", [lines[0] | {"custom_id": "b"}]), tmp_path / "best.jsonl")
    _run(_write(tmp_path / "in2.jsonl", [lines[1]]), tmp_path / "all.jsonl")
    (best,), (every,) = _read(tmp_path / "best.jsonl"), _read(tmp_path / "all.jsonl")
    best, every = (each["response"]["body"] for each in (best, every))
    texts = [choice["text"] for choice in every["choices"]]
    # The scripted engine gives samples of even index the better log-probabilities.
    assert [(c["index"], c["text"], c["logprobs"]) for c in best["choices"]] == [
        (number, texts[place], None) for number, place in enumerate((0, 2, 4, 6))
    ]
    assert best["usage"] == every["usage"]


def test_errors_may_have_a_file_of_their_own(tmp_path):
    source = _write(tmp_path / "in.jsonl", [_line("a"), _line("b", n="x"), _line("c")])
    _run(source, tmp_path / "out.jsonl", errors=tmp_path / "errors.jsonl")
    assert {r["custom_id"] for r in _read(tmp_path / "out.jsonl")} == {"a", "c"}
    assert [r["custom_id"] for r in _read(tmp_path / "errors.jsonl")] == ["b"]
    again, _ = _run(source, tmp_path / "out.jsonl", errors=tmp_path / "errors.jsonl")
    assert again.counts.before == 3


def test_a_request_that_fails_inside_the_engine_fails_alone(tmp_path):
    source = _write(
        tmp_path / "in.jsonl", [_line("a", prompt=[5]), _line("b", prompt=[[6], [7]]), _line("c", prompt=[8])]
    )
    _run(source, tmp_path / "out.jsonl", ScriptedEngine(fail=[7]))
    records = {r["custom_id"]: r for r in _read(tmp_path / "out.jsonl")}
    assert [records[name]["response"]["status_code"] for name in "abc"] == [200, 500, 200]
    assert records["b"]["error"]["code"] == "internal_error"


def _job(tmp_path, count=60):
    rng = random.Random(0)
    lines = []
    for i in range(count):
        lines.append(_line(f"é{i}", prompt=f"q{i}", n=rng.choice([1, 1, 3]), max_tokens=rng.randrange(1, 20)))
        if i % 17 == 5:
            lines.append("{broken\n")
    return _write(tmp_path / "in.jsonl", lines)


def _sorted(path):
    def text(record):
        record["response"]["body"].pop("created", None)
        return json.dumps(record, sort_keys=True)

    return sorted(map(text, _read(path)))


@pytest.mark.parametrize("schedule", ["fifo", "planned"])
def test_an_interrupted_job_goes_on_without_losing_or_doubling_a_line(tmp_path, schedule):
    source = _job(tmp_path)
    _run(source, tmp_path / "whole.jsonl")
    whole = _sorted(tmp_path / "whole.jsonl")
    assert len(whole) == 64
    rng, interrupted = random.Random(1), 0
    for _ in range(100):
        output = tmp_path / "out.jsonl"
        result, shown = _run(
            source, output, ScriptedEngine(interrupt_after=rng.randrange(30), schedule=schedule), window=7
        )
        interrupted += result.interrupted
        if not result.interrupted:
            break
        assert "interrupted: " in shown and "the same command goes on" in shown
        if rng.random() < 0.7 and output.stat().st_size:  # what kill -9 or a full disk may leave
            raw = output.read_bytes()
            output.write_bytes(raw[: rng.randrange(len(raw) - 200 if len(raw) > 200 else 0, len(raw))])
    assert interrupted > 3
    assert _sorted(output) == whole


def test_seeds_of_requests_that_give_none_differ_and_are_the_same_in_every_run(tmp_path):
    source = _write(tmp_path / "in.jsonl", [_line(f"{i}", prompt="x") for i in range(8)])
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        _run(source, tmp_path / name, seed=seed)
    one, two, three = (_texts(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert len(set(map(str, one.values()))) == 8
    assert all(one[name] != three[name] for name in one)


def test_the_engine_is_told_of_a_window_of_requests(tmp_path):
    source = _job(tmp_path)
    small, large = ScriptedEngine(), ScriptedEngine(schedule="planned")
    _run(source, tmp_path / "small.jsonl", small, window=4)
    assert small.most_known <= 4 * 3
    _run(source, tmp_path / "large.jsonl", large, window=4)
    assert large.most_known > large.planned > 60 - 1
    assert _sorted(tmp_path / "small.jsonl") == _sorted(tmp_path / "large.jsonl")


def test_refuses_an_output_of_something_else(tmp_path):
    source = _write(tmp_path / "in.jsonl", [_line("a"), _line("b")])
    output = tmp_path / "out.jsonl"
    _run(source, output)
    changed = _write(tmp_path / "changed.jsonl", [_line("a"), _line("b", n=2)])
    with pytest.raises(UserError, match=r"out\.jsonl:\d: answers no line of .*changed\.jsonl as it is now: choose"):
        Job(MODEL, changed, output)
    longer = _write(tmp_path / "longer.jsonl", [_line("a"), _line("b"), _line("c")])
    result, _ = _run(longer, output)  # what was added is answered
    assert (result.counts.before, result.counts.answered) == (2, 1)
    output.write_text(output.read_text().replace('"model": "small"', '"model": "large"', 1))
    with pytest.raises(UserError, match=r"out\.jsonl:1: was written by the model 'large', and this is 'small'"):
        Job(MODEL, longer, output)
    others = {
        "hello\n": "1: is not JSON",
        "{}\n": "1: answers no line",
        "[]\n": "1: answers no line",
        "my notes": "the last line is no answer",
        '{"a": 1}': "the last line is no answer",
    }
    for text, message in others.items():
        output.write_text(text)
        with pytest.raises(UserError, match=rf"out\.jsonl:? ?{message}"):
            Job(MODEL, source, output)
        assert output.read_text() == text


def test_refuses_files_that_cannot_be_used(tmp_path):
    source = _write(tmp_path / "in.jsonl", [_line("a")])
    with pytest.raises(UserError, match=r"nothing\.jsonl: cannot be read"):
        Job(MODEL, tmp_path / "nothing.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=r"empty\.jsonl: is empty"):
        Job(MODEL, _write(tmp_path / "empty.jsonl", ["\n", " \n"]), tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="must be different files"):
        Job(MODEL, source, tmp_path / "sub/../in.jsonl")
    with pytest.raises(UserError, match="cannot be written"):
        Job(MODEL, source, tmp_path)
    first = Job(MODEL, source, tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="another job is writing it"):
        Job(MODEL, source, tmp_path / "out.jsonl")
    first.run(ScriptedEngine(), console=rich.console.Console(file=io.StringIO()))
    assert len(_read(tmp_path / "out.jsonl")) == 1
