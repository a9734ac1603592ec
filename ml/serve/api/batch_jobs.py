"""Batches that run in the background, line by line through the engine that answers everyone else too."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import secrets
import time
from typing import IO, Any

from ml.errors import UserError
from ml.serve.api.driver import Draining, QueueFull
from ml.serve.api.errors import ApiError, api_error
from ml.serve.api.file_store import FileStore, StoredFile
from ml.serve.api.protocol import BatchBody
from ml.serve.api.server import Server
from ml.serve.batch.input_file import InputFile
from ml.serve.batch.lines import BatchLine, answer_line, error_line
from ml.serve.text.fields import FieldError

_log = logging.getLogger(__name__)
_SECONDS = 24 * 3600
_MOST_ERRORS = 100


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

    def complain(self, message: str, code: str, line: int | None = None) -> None:
        """Notes what makes the whole batch fail."""
        if len(self.errors) < _MOST_ERRORS:
            self.errors.append({"code": code, "message": message, "line": line, "param": None})

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
                source = await asyncio.to_thread(InputFile, file.path)
                stack.callback(source.close)
                job.total = len(source)
                for index, error in source.errors.items():
                    job.complain(str(error), "invalid_line", int(source.where(index).rpartition(":")[2]))
                if not job.errors:
                    job.become("in_progress")
                    await self._answer_all(job, source, sinks)
                    job.become("finalizing")
            except UserError as error:
                job.complain(str(error).replace(str(file.path), file.name), "invalid_file")
            except asyncio.CancelledError:
                job.become("cancelling")
            except Exception:
                _log.exception("a batch failed")
                job.complain("the server failed", "server_error")
        if outputs["output"].path.stat().st_size:
            self._store.add(outputs["output"])
            job.output = outputs["output"].id
        if outputs["error"].path.stat().st_size:
            self._store.add(outputs["error"])
            job.error_output = outputs["error"].id
        if job.errors:
            job.become("failed")
        else:
            job.become("completed" if job.status == "finalizing" else "cancelled")

    async def _answer_all(self, job: Job, source: InputFile, sinks: dict[str, IO[str]]) -> None:
        """A few workers take line after line, so that no more than these are in the engine."""
        indices = iter(range(len(source)))

        async def work() -> None:
            for index in indices:
                line, digest = source.read(index), source.digests[index]
                try:
                    record = answer_line(digest, line.custom_id, await self._answer(job, line))
                except Exception as error:
                    answer = api_error(error)
                    record = error_line(digest, line.custom_id, error, "line", answer.status)
                    record["response"]["body"], record["error"] = answer.body, None
                    job.failed += 1
                    sinks["error"].write(json.dumps(record) + "\n")
                else:
                    job.completed += 1
                    sinks["output"].write(json.dumps(record, ensure_ascii=False) + "\n")

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._server.settings.batch_concurrency, job.total)):
                group.create_task(work())

    async def _answer(self, job: Job, line: BatchLine) -> dict[str, Any]:
        if line.url != job.body.endpoint:
            raise FieldError("url", f"must be the batch's endpoint, {job.body.endpoint}")
        if line.body.get("stream"):
            raise FieldError("stream", "must be false in a batch: answers come as a whole")
        while True:
            try:
                return await self._server.complete(line.url, line.body)
            except QueueFull:
                await asyncio.sleep(0.1)
