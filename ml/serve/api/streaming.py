"""Answers as server-sent events, chunk for chunk as OpenAI sends them."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import StreamingResponse

from ml.serve.api.errors import api_error
from ml.serve.api.server import Running, Server
from ml.serve.text.answers import SampleText, usage
from ml.serve.text.requests import TextRequest


class Chunks:
    """The chunks of one answer."""

    def __init__(self, server: Server, request: TextRequest, options: Mapping[str, Any]):
        self._request, self._usage = request, bool(options.get("include_usage"))
        prefix = "chatcmpl" if request.chat else "cmpl"
        self._common = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk" if request.chat else "text_completion",
            "created": int(time.time()),
            "model": server.model.name,
        }
        self._shown: dict[int, int] = {}  # by choice: tokens whose log-probabilities are out

    def of(self, choices: list[dict[str, Any]], counts: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A chunk with ``choices``."""
        chunk: dict[str, Any] = {**self._common, "choices": choices}
        if self._usage:
            chunk["usage"] = counts
        return chunk

    def opening(self, samples: list[SampleText]) -> list[dict[str, Any]]:
        """Chunks that come before any news: the role of each message, or the prompt."""
        if self._request.chat:
            delta = {"role": "assistant", "content": "", "refusal": None}
            return [self._choice(sample, delta=delta) for sample in samples]
        # Where log-probabilities are asked for, the prompt's come with its text, and both with the first news.
        return [self._choice(s, text=self._echo(s)) for s in samples if self._echo(s) and not s.wants_logprobs]

    def news(self, sample: SampleText, text: str) -> list[dict[str, Any]]:
        """Chunks for what is new of a sample."""
        if sample.wants_logprobs and sample.number not in self._shown:
            text = self._echo(sample) + text
        first = self._shown.get(sample.number, 0)
        logprobs = sample.choice_logprobs(first) if len(sample.logprobs) > first else None
        self._shown[sample.number] = len(sample.logprobs)
        chunks = []
        ended = sample.finish_reason is not None
        if self._request.chat:
            if text or logprobs:
                chunks.append(self._choice(sample, delta={"content": text}, logprobs=logprobs))
            if ended:
                chunks.append(self._choice(sample, delta={}, reason=sample.finish_reason))
        elif text or logprobs or ended:
            chunks.append(self._choice(sample, text=text, logprobs=logprobs, reason=sample.finish_reason))
        return chunks

    def _echo(self, sample: SampleText) -> str:
        return self._request.echo[sample.prompt] if self._request.echo else ""

    def closing(self, running: Running) -> list[dict[str, Any]]:
        """The chunk that counts, if it was asked for."""
        return [self.of([], usage(self._request, running.samples, running.cached))] if self._usage else []

    def _choice(self, sample: SampleText, *, logprobs: Any = None, reason: str | None = None, **of: Any) -> Any:
        return self.of([{"index": sample.number, **of, "logprobs": logprobs, "finish_reason": reason}])


async def streamed(
    server: Server, request: TextRequest, options: Mapping[str, Any], deadline: float
) -> StreamingResponse:
    """Begins, so that what is wrong with the request still has a status of its own; then streams.

    Args:
      server: answers.
      request: what was asked.
      options: ``stream_options``.
      deadline: the event loop's time at which the request ends.
    """
    running = await server.begin(request)
    chunks = Chunks(server, request, options)

    async def events() -> AsyncIterator[str]:
        try:
            async with asyncio.timeout_at(deadline):
                for chunk in chunks.opening(running.samples):
                    yield _event(chunk)
                async for sample, text in running:
                    for chunk in chunks.news(sample, text):
                        yield _event(chunk)
                for chunk in chunks.closing(running):
                    yield _event(chunk)
        except Exception as error:  # the status is out: the client reads it here
            yield _event(api_error(error).body)
        finally:
            for stream in running.streams:
                stream.cancel()
        yield "data: [DONE]\n\n"

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
