"""`scripts/chat.py` against a real server whose engine counts: what is sent, shown, kept and refused."""

import importlib.util
import io
import itertools
import sys
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from rich.console import Console
from tiny_server import TinyServer

from ml.errors import UserError

_SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(_SCRIPTS))
    spec = importlib.util.spec_from_file_location("chat_script", _SCRIPTS / "chat.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(_SCRIPTS))


@pytest.fixture(scope="module")
def served():
    server = TinyServer(engine=FakeEngine(), api_key="secret")
    with server.listening() as address:
        yield server, f"{address}/v1"


@pytest.fixture
def chat(script, served):
    """Makes a chat, its console and what is shown there."""

    def make(**settings):
        client, model = script.connect(served[1], "secret", None)
        shown = io.StringIO()
        common = {"system": "", "completions": False, "max_tokens": 5}
        console = Console(file=shown, soft_wrap=True)
        return script.Chat(client, model, console, **common | settings), console, shown

    return make


def talk(script, chat, console, lines, monkeypatch):
    lines = iter(lines)

    def typed(prompt):
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    script.converse(chat, console, terminal=True)


def test_a_conversation_is_kept_until_it_is_reset(script, chat, monkeypatch):
    one, console, shown = chat(system="Be brief.")
    talk(script, one, console, ["first", "", "a \\", "b"], monkeypatch)
    assert [m["role"] for m in one.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert one.messages[3]["content"] == "a \nb"
    assert one.messages[2]["content"] and shown.getvalue().count(one.messages[2]["content"]) == 2
    talk(script, one, console, ["/retry"], monkeypatch)
    assert [m["content"] for m in one.messages[3:4]] == ["a \nb"] and len(one.messages) == 5
    talk(script, one, console, ["/reset", "/what", "/exit", "never"], monkeypatch)
    assert (
        one.messages == [{"role": "system", "content": "Be brief."}] and "forget the conversation" in shown.getvalue()
    )
    talk(script, one, console, ["/system  Shout. ", "/retry"], monkeypatch)
    assert one.messages == [{"role": "system", "content": "Shout."}] and "nothing has been asked" in shown.getvalue()


def test_ctrl_c_stops_the_answer_and_the_server(script, chat, served, monkeypatch):
    one, console, shown = chat(max_tokens=400)
    stream = one._stream

    def interrupted(text):
        pieces = stream(text)
        yield from itertools.islice(pieces, 2)
        pieces.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(one, "_stream", interrupted)
    talk(script, one, console, ["go", KeyboardInterrupt()], monkeypatch)
    assert "(stopped)" in shown.getvalue() and [m["role"] for m in one.messages] == ["user", "assistant"]


def test_completions_send_the_text_as_it_is(script, chat, monkeypatch):
    one, console, shown = chat(completions=True)
    talk(script, one, console, ["abc"], monkeypatch)
    assert one.messages[-1]["role"] == "assistant" and one.messages[-1]["content"] in shown.getvalue()


def test_what_the_server_refuses_is_shown_and_the_talk_goes_on(script, chat, monkeypatch):
    one, console, shown = chat(max_tokens=100_000)
    talk(script, one, console, ["too much"], monkeypatch)
    assert one.messages == [] and "max_tokens" in shown.getvalue()


def test_mistakes_end_in_one_helpful_sentence(script, served):
    address = served[1]
    with pytest.raises(UserError, match=r"no server answers there; start one: python scripts/serve\.py"):
        script.connect("http://127.0.0.1:9/v1", None, None)
    with pytest.raises(UserError, match="--api_key"):
        script.connect(address, "wrong", None)
    with pytest.raises(UserError, match="--model=gpt-9: the server has no such model, but tiny"):
        script.connect(address, "secret", "gpt-9")


def test_a_model_without_a_template_is_named_with_the_way_out(script, monkeypatch):
    server = TinyServer(engine=FakeEngine())
    object.__setattr__(server.model, "chat_template", None)
    with server.listening() as address:
        client, model = script.connect(f"{address}/v1", None, None)
        one = script.Chat(client, model, Console(file=io.StringIO()), system="", completions=False)
        with pytest.raises(UserError, match="no chat template; give --completions"):
            one.ask("hello")
