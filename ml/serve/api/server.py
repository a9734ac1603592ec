"""What the handlers share: the model, the thread of its engine, and the work of answering one body."""

import asyncio
import base64
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ml.serve.api.driver import Driver
from ml.serve.api.embedder import Embedder
from ml.serve.api.errors import ApiError
from ml.serve.api.metrics import Metrics
from ml.serve.api.settings import ServerSettings
from ml.serve.api.stream import Delta, Stream
from ml.serve.text import ServedModel
from ml.serve.text.answers import SampleText, answer
from ml.serve.text.fields import FieldError, Fields
from ml.serve.text.requests import TextRequest, check_model, reader

EMBEDDINGS = "/v1/embeddings"


class Server:
    """Answers bodies; knows nothing of HTTP but its status codes."""

    def __init__(
        self, model: ServedModel, driver: Driver, embedder: Embedder, settings: ServerSettings, metrics: Metrics
    ):
        self.model, self.driver, self.settings, self.metrics = model, driver, settings, metrics
        self._embedder = embedder
        self._worker = ThreadPoolExecutor(1, "embedder")

    def check_model(self, body: Mapping[str, Any]) -> None:
        """Raises `ApiError` if a body names a model that is not here."""
        try:
            check_model(body, self.model)
        except FieldError as error:
            raise ApiError(404, str(error), param="model", code="model_not_found") from error

    async def read(self, url: str, body: Mapping[str, Any]) -> TextRequest:
        """Reads a body of completions or chats, in a thread: a long text takes its time."""
        self.check_model(body)
        seed = secrets.randbits(32)
        request = await asyncio.to_thread(reader(url), body, self.model, max_length=self.settings.max_length, seed=seed)
        samples = sum(each.samples for each in request.sampling)
        if samples > self.driver.capacity:
            raise ApiError(
                400,
                f"prompts times n is {samples}, but at most {self.driver.capacity} can wait here: split the request",
            )
        return request

    async def begin(self, request: TextRequest) -> "Running":
        """Hands a request to the engine; errors of `Driver.submit_all`."""
        streams = await self.driver.submit_all(request.prompts, request.sampling)
        return Running(self.model, request, streams)

    async def complete(self, url: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The whole answer to a body, within the time that requests have."""
        async with asyncio.timeout(self.settings.request_timeout):
            if url == EMBEDDINGS:
                return await self.embed(body)
            request = await self.read(url, body)
            running = await self.begin(request)
            async for _ in running:
                pass
            return answer(secrets.token_hex(12), self.model, request, running.samples, running.cached)

    async def embed(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a body of embeddings."""
        self.check_model(body)
        fields = Fields(body, ("input", "model", "encoding_format", "dimensions", "user"))
        size = self.model.config.embed_dim
        if (wanted := fields.integer("dimensions")) not in (None, size):
            raise FieldError("dimensions", f"is {wanted}, but this model's embeddings have {size}; leave it out")
        form = fields.text("encoding_format") or "float"
        if form not in ("float", "base64"):
            raise FieldError("encoding_format", f"is {form!r}; must be 'float' or 'base64'")
        texts = await asyncio.to_thread(self._texts, fields)
        loop = asyncio.get_running_loop()
        vectors = await loop.run_in_executor(self._worker, self._embedder.embed, texts)
        tokens = sum(map(len, texts))
        return {
            "object": "list",
            "model": self.model.name,
            "data": [
                {"object": "embedding", "index": i, "embedding": _encoded(vector, form)}
                for i, vector in enumerate(vectors)
            ],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def _texts(self, fields: Fields) -> list[list[int]]:
        given = fields.required("input")
        many = given if isinstance(given, list) else [given]
        if not many:
            raise FieldError("input", "is an empty list; give at least one text")
        if all(type(each) is int for each in many):
            many = [many]
        if len(many) > 2048:
            raise FieldError("input", f"has {len(many)} texts; at most 2048")
        last, longest = self.model.config.vocab_size - 1, self.model.config.max_length
        texts: list[list[int]] = []
        for each in many:
            if isinstance(each, str):
                ids = self.model.encode(fields.unicode("input", each))
            elif isinstance(each, list) and each and all(type(i) is int and 0 <= i <= last for i in each):
                ids = each
            else:
                raise FieldError("input", f"must be texts, or lists of token ids between 0 and {last}, none empty")
            if len(ids) > longest:
                raise FieldError("input", f"text {len(texts)} is {len(ids)} tokens long; at most {longest}")
            texts.append(ids)
        return texts


class Running(AsyncIterator[tuple[SampleText, str]]):
    """A request in the engine: gives each sample as its text grows, with the new text.

    To stop iterating before the end ends the request too.

    Attributes:
      streams: of the prompts.
      samples: of all prompts.
    """

    def __init__(self, model: ServedModel, request: TextRequest, streams: Sequence[Stream]):
        self.streams = streams
        self._of_stream = [
            [SampleText(model, request, prompt, index) for index in range(stream.samples)]
            for prompt, stream in enumerate(streams)
        ]
        self.samples = [sample for each in self._of_stream for sample in each]
        self._news = self._read()

    @property
    def cached(self) -> list[int]:
        """Tokens of each prompt that were found in the cache."""
        return [stream.cached for stream in self.streams]

    async def __anext__(self) -> tuple[SampleText, str]:
        return await anext(self._news)

    async def _read(self) -> AsyncIterator[tuple[SampleText, str]]:
        event = self.streams[0].event
        open_ = dict(enumerate(self.streams))
        try:
            while open_:
                event.clear()
                for prompt, stream in list(open_.items()):
                    done = stream.done
                    while (delta := stream.take()) is not None:
                        sample = self._of_stream[prompt][delta.index]
                        if sample.finish_reason is None:
                            yield sample, self._push(stream, sample, delta)
                    if done:
                        del open_[prompt]
                if open_:
                    await event.wait()
        finally:
            for stream in self.streams:
                stream.cancel()

    @staticmethod
    def _push(stream: Stream, sample: SampleText, delta: Delta) -> str:
        sample.prompt_logprobs = stream.prompt_logprobs
        text = sample.push(delta.tokens, delta.logprobs)
        if sample.stopped:
            stream.cancel(delta.index)
        elif delta.finish_reason is not None:
            text += sample.end(delta.finish_reason)
        return text


def _encoded(vector: np.ndarray, form: str) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.astype(float).tolist()
