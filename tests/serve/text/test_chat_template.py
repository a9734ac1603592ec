"""Chat templates: found as a folder holds them, rendered as transformers does, and clear about what they refuse."""

import datetime
import itertools
import json

import pytest
from chat_templates import CHATML, CONVERSATIONS, GEMMA, LLAMA_3, QWEN, TEMPLATES, TOOLS

from ml.data.tokenizer import Tokenizer
from ml.errors import UserError
from ml.serve.text.chat_template import ChatTemplate

SPECIAL = {"bos_token": "<|begin|>", "eos_token": {"__type": "AddedToken", "content": "<|end|>"}}
ONE = CONVERSATIONS["one"]


def _folder(path, template=None, jinja=None, named=()):
    path.mkdir(exist_ok=True)
    settings = dict(SPECIAL) if template is None else {**SPECIAL, "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if jinja is not None:
        (path / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    for name, text in named:
        (path / "additional_chat_templates").mkdir(exist_ok=True)
        (path / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    return path


def _render(tmp_path, template, messages, *arguments, **more):
    return ChatTemplate.load(_folder(tmp_path, template)).render(messages, *arguments, **more)


def test_written_out(tmp_path):
    assert _render(tmp_path, CHATML, CONVERSATIONS["turns"]) == (
        "<|im_start|>user\n1 + 1?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nhm\n</think>\n\n2<|im_end|><|end|>\n"
        "<|im_start|>user\n漢字 {{ not a template }} 🎉<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert _render(tmp_path, QWEN, CONVERSATIONS["turns"], enable_thinking=False) == (
        "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n漢字 {{ not a template }} 🎉<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert _render(tmp_path, GEMMA, ONE, None, False) == (
        '<|begin|><start_of_turn>user\nHi <b>there</b> & "you"<end_of_turn>\n'
    )
    day = datetime.datetime.now().strftime("%d %b %Y")
    assert _render(tmp_path, LLAMA_3, ONE) == (
        f"<|begin|><|start_header_id|>system<|end_header_id|>\n\nToday Date: {day}\n\n<|eot_id|>"
        '<|start_header_id|>user<|end_header_id|>\n\nHi <b>there</b> & "you"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert '"place": "Zürich <é> & \'\\"\'"' in _render(tmp_path, LLAMA_3, CONVERSATIONS["tools"])


def test_where_a_template_is_found(tmp_path):
    def shown(folder, **options):
        return ChatTemplate.load(folder, **options).render(ONE, **({"tools": TOOLS} if "tool" in folder.name else {}))

    assert ChatTemplate.load(_folder(tmp_path / "none")) is None
    assert ChatTemplate.load(tmp_path / "nowhere") is None
    assert shown(_folder(tmp_path / "string", "a")) == "a"
    several = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert shown(_folder(tmp_path / "list", several)) == "a"
    assert shown(_folder(tmp_path / "list_tools", several)) == "b"
    assert shown(_folder(tmp_path / "jinja", "a", "c")) == "c"
    assert shown(_folder(tmp_path / "named_tools", jinja="c", named=[("tool_use", "d")])) == "d"
    assert shown(_folder(tmp_path / "named", jinja="c", named=[("tool_use", "d")])) == "c"
    (tmp_path / "own.jinja").write_text("e{{ eos_token }}")
    assert shown(_folder(tmp_path / "given", "a", "c"), file=tmp_path / "own.jinja") == "e<|end|>"
    assert shown(tmp_path / "nowhere", file=tmp_path / "own.jinja") == "e"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ([{"name": "rag", "template": "x"}], "none is named 'default', only rag; give one with --chat_template=FILE"),
        ([{"name": "default"}], "chat_template: must be a string or a list"),
        (5, "chat_template: must be a string or a list"),
        ("a\n{% if %}", "chat template, line 2: .*mend it, or give another with --chat_template=FILE"),
        ("{{ messages[7].role }}", "messages: the chat template in .* fails on them .UndefinedError"),
        ("{{ 1 / 0 }}", "messages: the chat template in .* fails on them .ZeroDivisionError"),
        ("{{ raise_exception('only cats') }}", "messages: the model's chat template refuses them: only cats"),
        # A template is someone else's program.
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "messages: the chat template .*SecurityError"),
        ("{{ messages.append(1) }}", "messages: the chat template .*SecurityError"),
        ("{% for i in range(10**9) %}{% endfor %}", "messages: the chat template .*OverflowError"),
    ],
)
def test_refuses(tmp_path, template, message):
    with pytest.raises(UserError, match=message):
        _render(tmp_path, template, list(ONE))


def test_refuses_what_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="messages: is empty"):
        _render(tmp_path, "a", [])
    with pytest.raises(UserError, match=r"nothing\.jinja: cannot be read"):
        ChatTemplate.load(tmp_path, file=tmp_path / "nothing.jinja")
    (tmp_path / "bad.jinja").write_text("{% endif %}")
    with pytest.raises(UserError, match=r"bad\.jinja: chat template, line 1"):  # at once, since it was asked for
        ChatTemplate.load(tmp_path, file=tmp_path / "bad.jinja")
    (tmp_path / "latin.jinja").write_bytes("ä".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jinja: not UTF-8 at byte 0"):
        ChatTemplate.load(tmp_path, file=tmp_path / "latin.jinja")
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not a JSON object"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize("form", ["string", "list", "jinja"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(tmp_path, name, form):
    import jinja2
    import transformers

    Tokenizer.train(["Fünf große Äpfel. " * 20], 280).save(tmp_path)
    template = TEMPLATES[name]
    listed = [{"name": "default", "template": template}, {"name": "tool_use", "template": f"T{template}"}]
    given = {"string": template, "list": listed, "jinja": None}[form]
    _folder(tmp_path, given, template if form == "jinja" else None)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = ChatTemplate.load(tmp_path)
    refused = 0
    for messages, tools, prompt, more in itertools.product(
        CONVERSATIONS.values(), (None, TOOLS), (False, True), ({}, {"enable_thinking": False}, {"date_string": "today"})
    ):
        try:
            expected = theirs.apply_chat_template(
                messages, tools=tools, add_generation_prompt=prompt, tokenize=False, **more
            )
        except (jinja2.TemplateError, TypeError):
            refused += 1
            with pytest.raises(UserError, match=r"^messages: the "):
                ours.render(messages, tools, prompt, **more)
        else:
            assert ours.render(messages, tools, prompt, **more) == expected
    assert refused == {"llama_3": 12, "qwen": 0, "gemma": 24, "chatml": 0}[name]
