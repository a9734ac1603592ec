"""Talks to a served model in the terminal."""

import os
import sys
from collections.abc import Generator
from typing import Any

import app
from absl import flags
from rich.console import Console
from rich.text import Text

from ml.errors import UserError

USAGE = """Talks to a model that scripts/serve.py serves (or to any server that speaks as OpenAI's does). Answers appear
as they are written; Ctrl-C stops one, Ctrl-D or /exit leaves. Needs: pip install -e '.[chat]'

Examples:
  python scripts/chat.py --system="Answer in one sentence."
  python scripts/chat.py --completions          # for models without a chat template: what you type is continued
  echo "def main(" | python scripts/chat.py --completions
"""
COMMANDS = """/reset        forget the conversation
/system TEXT  set the system prompt, and forget the conversation
/retry        have the last question answered again
/exit         leave (or Ctrl-D); a line that ends in \\ goes on in the next"""

_URL = flags.DEFINE_string("url", "http://localhost:8000/v1", "Address of the server.")
_API_KEY = flags.DEFINE_string("api_key", None, "Bearer token, if it wants one (default: MEGABATCH_API_KEY).")
_MODEL = flags.DEFINE_string("model", None, "Name of the model (default: the server's first).")
_SYSTEM = flags.DEFINE_string("system", "", "System prompt.")
_COMPLETIONS = flags.DEFINE_bool("completions", False, "Continue what is typed, each time anew, without a template.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0: always the likeliest token.", 0.0)
_TOP_P = flags.DEFINE_float("top_p", 0.95, "Draw from the likeliest tokens that hold this probability.", 0.0, 1.0)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 512, "Most tokens of an answer.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", None, "Makes answers repeatable.")


class Chat:
    """A conversation.

    Attributes:
      messages: so far, in OpenAI's form; the system prompt first, if there is one.
    """

    def __init__(self, client: Any, model: str, console: Console, *, system: str, completions: bool, **sampling: Any):
        self._client, self._model, self._console = client, model, console
        self._completions, self._sampling = completions, sampling
        self.messages: list[dict[str, str]] = []
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Forgets all but the system prompt, or sets a new one."""
        if system is None:
            system = next((m["content"] for m in self.messages if m["role"] == "system"), "")
        self.messages = [{"role": "system", "content": system}] if system else []

    def obey(self, line: str) -> bool:
        """Follows a command; returns whether to go on."""
        name, _, rest = line.partition(" ")
        if name == "/exit":
            return False
        if name == "/reset":
            self.reset()
            self._say("forgotten")
        elif name == "/system":
            self.reset(rest.strip())
            self._say(f"system prompt: {rest.strip() or 'none'}")
        elif name == "/retry":
            asked = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
            if asked:
                text, self.messages = self.messages[asked[-1]]["content"], self.messages[: asked[-1]]
                self.ask(text)
            else:
                self._say("nothing has been asked yet")
        else:
            self._say(COMMANDS)
        return True

    def ask(self, text: str) -> None:
        """Sends a message and shows the answer as it comes; Ctrl-C ends it, and what came is kept.

        Raises:
          UserError: there is no server, or it cannot do this.
        """
        self.messages.append({"role": "user", "content": text})
        answer, pieces = "", self._stream(text)
        try:
            for piece in pieces:
                answer += piece
                self._console.out(piece, end="", highlight=False)
        except KeyboardInterrupt:
            self._console.print(" [dim](stopped)[/]", end="")
        except Exception as error:
            self.messages.pop()
            self._refused(error)
            return
        finally:
            pieces.close()
        self._console.print()
        self.messages.append({"role": "assistant", "content": answer})

    def _stream(self, text: str) -> Generator[str, None, None]:
        """Pieces of the answer; closing the iterator tells the server to stop."""
        if self._completions:
            with self._client.completions.create(
                model=self._model, prompt=text, stream=True, **self._sampling
            ) as stream:
                for chunk in stream:
                    yield from (choice.text for choice in chunk.choices)
            return
        with self._client.chat.completions.create(
            model=self._model, messages=self.messages, stream=True, **self._sampling
        ) as stream:
            for chunk in stream:
                yield from (choice.delta.content or "" for choice in chunk.choices)

    def _refused(self, error: Any) -> None:
        """What can be mended by other flags ends the program; anything else ends the answer only."""
        import openai

        if isinstance(error, openai.APIConnectionError):
            raise no_server(self._client.base_url) from error
        if type(error).__module__.startswith("httpx"):  # in the middle of a stream the client passes these on
            raise UserError(f"--url={self._client.base_url}: the server went away ({error})") from error
        if not isinstance(error, openai.APIError):
            raise error
        message = error.message if not isinstance(error.body, dict) else error.body.get("message", error.message)
        if "chat template" in message:
            raise UserError(
                f"--model={self._model}: it has no chat template; give --completions to have texts continued, or start "
                "the server with --chat_template=FILE"
            ) from error
        self._say(message, "red")

    def _say(self, text: str, style: str = "dim") -> None:
        self._console.print(Text(text, style))


def no_server(url: object) -> UserError:
    """Nobody listens there."""
    return UserError(
        f"--url={url}: no server answers there; start one: python scripts/serve.py --model=runs/quickstart"
    )


def connect(url: str, api_key: str | None, model: str | None) -> tuple[Any, str]:
    """The client, and the model's name.

    Raises:
      UserError: no server, a wrong key or no such model.
    """
    import openai

    client = openai.OpenAI(base_url=url, api_key=api_key or "none", max_retries=0)
    try:
        names = [each.id for each in client.models.list()]
    except openai.APIConnectionError as error:
        raise no_server(url) from error
    except openai.AuthenticationError as error:
        raise UserError("--api_key: the server wants another one (or set MEGABATCH_API_KEY)") from error
    except openai.APIError as error:
        raise UserError(f"--url={url}: not a server that speaks as OpenAI's does ({error.message})") from error
    if model is None and names:
        return client, names[0]
    if model not in names:
        raise UserError(f"--model={model}: the server has no such model, but {', '.join(names) or 'none'}")
    assert model is not None
    return client, model


def converse(chat: Chat, console: Console, *, terminal: bool) -> None:
    """Reads lines until the end of input, and answers them."""
    lines: list[str] = []
    while True:
        try:
            line = input(("... " if lines else "> ") if terminal else "")
        except EOFError:
            break
        except KeyboardInterrupt:
            console.print()
            if not lines:
                break
            lines = []
            continue
        lines.append(line.removesuffix("\\"))
        if line.endswith("\\"):
            continue
        text, lines = "\n".join(lines), []
        if text.startswith("/"):
            if not chat.obey(text.strip()):
                return
        elif text.strip():
            chat.ask(text)
    if lines:
        chat.ask("\n".join(lines))


def main() -> None:
    """Connects and talks."""
    terminal = sys.stdin.isatty()
    console = Console(soft_wrap=True, highlight=False)
    client, model = connect(_URL.value, _API_KEY.value or os.environ.get("MEGABATCH_API_KEY"), _MODEL.value)
    sampling = {"temperature": _TEMPERATURE.value, "top_p": _TOP_P.value, "max_tokens": _MAX_TOKENS.value}
    if _SEED.value is not None:
        sampling["seed"] = _SEED.value
    if terminal:
        import readline  # noqa: F401 - gives input() its history and editing

        console.print(f"[bold]{model}[/] [dim]at {_URL.value}; /help lists the commands[/]")
    chat = Chat(client, model, console, system=_SYSTEM.value, completions=_COMPLETIONS.value, **sampling)
    converse(chat, console, terminal=terminal)


if __name__ == "__main__":
    app.run(main, usage=USAGE)
