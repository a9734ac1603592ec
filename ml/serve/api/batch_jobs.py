"""Batches that run in the background, line by line through the engine that answers everyone else too."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import secrets
import time
from collections.abc import Iterator
from typing import IO, Any

from ml.serve.api.driver import Draining, QueueFull
from ml.serve.api.errors import ApiError, api_error
from ml.serve.api.file_store import FileStore, StoredFile
from ml.serve.api.protocol import BatchBody
from ml.serve.api.server import Server

_log = logging.getLogger(__name__)
_SECONDS = 24 * 3600
_MOST_LINES = 50_000  # as OpenAI


@dataclasses.dataclass
class Job:
    """One batch, and what the API says of it."""

    id: str
    body: BatchBody
    status: str = "validating"
    total: int = 0
    completed: int = 0
    failed: int = 0
    output: str | None = None
    error_output: str | None = None
    errors: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    times: dict[str, int] = dataclasses.field(default_factory=lambda: {"created": int(time.time())})
    task: "asyncio.Task[None] | None" = None

    def become(self, status: str) -> None:
        """Changes the status, and notes when."""
        self.status = status
        self.times[status] = int(time.time())

    @property
    def card(self) -> dict[str, Any]:
        """As the API shows it."""
        names = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.body.endpoint,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.body.input_file_id,
            "completion_window": self.body.completion_window,
            "status": self.status,
            "output_file_id": self.output,
            "error_file_id": self.error_output,
            "created_at": self.times["created"],
            "expires_at": self.times["created"] + _SECONDS,
            **{f"{name}_at": self.times.get(name) for name in names},
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": self.body.metadata,
        }


class BatchJobs:
    """All batches of a server; they end with it."""

    def __init__(self, server: Server, store: FileStore):
        self._server, self._store = server, store
        self._jobs: dict[str, Job] = {}

    def start(self, body: BatchBody) -> Job:
        """Begins a batch; raises `ApiError` if its file is not there."""
        file = self._store.get(body.input_file_id)
        if self._server.driver.draining:
            raise Draining
        job = Job(f"batch_{secrets.token_hex(12)}", body)
        self._jobs[job.id] = job
        job.task = asyncio.create_task(self._run(job, file))
        return job

    def get(self, batch_id: str) -> Job:
        """Raises `ApiError` if there is none."""
        if batch_id not in self._jobs:
            raise ApiError(404, f"there is no batch {batch_id!r}", param="batch_id", code="batch_not_found")
        return self._jobs[batch_id]

    def all(self) -> list[Job]:
        """Newest first."""
        return list(self._jobs.values())[::-1]

    def cancel(self, batch_id: str) -> Job:
        """Ends a batch; what it has so far is kept."""
        job = self.get(batch_id)
        if job.status not in ("validating", "in_progress"):
            raise ApiError(409, f"the batch is {job.status} already", code="not_cancellable")
        job.become("cancelling")
        assert job.task is not None
        job.task.cancel()
        return job

    async def close(self) -> None:
        """Ends all."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, job: Job, file: StoredFile) -> None:
        outputs = {name: self._store.new(f"{job.id}_{name}.jsonl", "batch_output") for name in ("output", "error")}
        with contextlib.ExitStack() as stack:
            sinks: dict[str, IO[str]] = {}
            for name, each in outputs.items():
                sinks[name] = stack.enter_context(open(each.path, "w", encoding="utf-8"))
            try:
                lines = await asyncio.to_thread(_read, file, job)
                job.total = len(lines)
                if job.errors:
                    job.become("failed")
                    return
                job.become("in_progress")
                await self._answer_all(job, iter(lines), sinks)
                job.become("finalizing")
            except asyncio.CancelledError:
                job.become("cancelling")
            except Exception:
                _log.exception("a batch failed")
                job.errors.append({"code": "server_error", "message": "the server failed", "line": None, "param": None})
                job.become("failed")
        if outputs["output"].path.stat().st_size:
            self._store.add(outputs["output"])
            job.output = outputs["output"].id
        if outputs["error"].path.stat().st_size:
            self._store.add(outputs["error"])
            job.error_output = outputs["error"].id
        if job.status != "failed":
            job.become("completed" if job.status == "finalizing" else "cancelled")

    async def _answer_all(self, job: Job, lines: Iterator[dict[str, Any]], sinks: dict[str, IO[str]]) -> None:
        """A few workers take line after line, so that no more than these are in the engine."""

        async def work() -> None:
            for line in lines:
                status, body = await self._answer(job, line)
                name = "output" if status == 200 else "error"
                job.completed += status == 200
                job.failed += status != 200
                sinks[name].write(json.dumps(_result(line, status, body), ensure_ascii=False) + "\n")

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._server.settings.batch_concurrency, job.total)):
                group.create_task(work())

    async def _answer(self, job: Job, line: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        while True:
            try:
                if line["url"] != job.body.endpoint:
                    raise ApiError(400, f"url: must be the batch's endpoint, {job.body.endpoint}", param="url")
                return 200, await self._server.complete(line["url"], line["body"])
            except QueueFull:
                await asyncio.sleep(0.1)
            except Exception as error:
                answer = api_error(error)
                return answer.status, answer.body


def _read(file: StoredFile, job: Job) -> list[dict[str, Any]]:
    """The lines of a batch; what is wrong with them goes to ``job.errors``."""
    lines: list[dict[str, Any]] = []
    names: set[str] = set()

    def complain(number: int, code: str, message: str) -> None:
        if len(job.errors) < 100:
            job.errors.append({"code": code, "message": message, "line": number, "param": None})

    with open(file.path, "rb") as source:
        for number, raw in enumerate(source, 1):
            if not raw.strip():
                continue
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError) as error:
                complain(number, "invalid_json_line", f"is not JSON: {error}")
                continue
            name = line.get("custom_id") if isinstance(line, dict) else None
            if not isinstance(name, str) or not isinstance(line.get("body"), dict) or line.get("method") != "POST":
                complain(number, "invalid_request", 'must be {"custom_id", "method": "POST", "url", "body": {...}}')
            elif name in names:
                complain(number, "duplicate_custom_id", f"custom_id {name!r} was there before")
            elif len(lines) == _MOST_LINES:
                complain(number, "too_many_requests", f"a batch has at most {_MOST_LINES} lines; split it")
                break
            else:
                names.add(name)
                lines.append({"custom_id": name, "url": line.get("url"), "body": line["body"]})
    if not lines and not job.errors:
        complain(1, "empty_file", "the file has no lines")
    return lines


def _result(line: dict[str, Any], status: int, body: dict[str, Any]) -> dict[str, Any]:
    name = secrets.token_hex(12)
    return {
        "id": f"batch_req_{name}",
        "custom_id": line["custom_id"],
        "response": {"status_code": status, "request_id": name, "body": body},
        "error": None,
    }
