"""An offline job: the requests of a file through an engine, each answered by a line of another file."""

import array
import contextlib
import dataclasses
import itertools
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import rich.console

from ml.errors import UserError
from ml.serve.batch.input_file import InputFile
from ml.serve.batch.lines import LINE_BEGINNING, LineError, answer_line, default_seed, digest_of, error_line
from ml.serve.batch.output_file import OutputFile
from ml.serve.batch.progress import Counts, Progress, guessed_share, hit_share
from ml.serve.batch.sizing import cache_tokens
from ml.serve.engine_config import EngineConfig
from ml.serve.front import Front
from ml.serve.sampling import TokenLogprobs
from ml.serve.scheduling.request import FinishReason, Sequence
from ml.serve.scheduling.statistics import Statistics
from ml.serve.scheduling.step import Update
from ml.serve.text.answers import SampleText, answer
from ml.serve.text.fields import FieldError
from ml.serve.text.requests import TextRequest, check_model, reader
from ml.serve.text.served_model import ServedModel

# Requests that the engine knows of beyond those that run: enough to choose from, few enough to hold.
_WINDOW = 4096


@dataclasses.dataclass(frozen=True)
class JobResult:
    """How a job ended.

    Attributes:
      counts: of requests.
      statistics: of the engine.
      seconds: it took.
      interrupted: whether it was stopped before its end.
    """

    counts: Counts
    statistics: Statistics
    seconds: float
    interrupted: bool


@dataclasses.dataclass(eq=False)
class _Line:
    """A line that the engine works on: its samples, and of each prompt the first of them as the engine knows it."""

    index: int
    custom_id: str
    request: TextRequest
    firsts: list[Sequence]
    samples: list[SampleText] = dataclasses.field(default_factory=list)
    ended: int = 0
    failed: bool = False


class Job:
    """The requests of one file, answered into another; a job that was killed goes on where it was.

    Answers come in the order in which they are finished. Which are done is read from the output itself.
    """

    def __init__(self, model: ServedModel, source: Path, output: Path, errors: Path | None = None):
        """Reads what is to be done and what is done.

        Args:
          model: what answers.
          source: requests in OpenAI's Batch file format.
          output: gets a line for each request.
          errors: gets the lines of requests that fail; ``None``: ``output`` does.

        Raises:
          UserError: a file cannot be read or written, or the output is that of another input or model.
        """
        paths = [path.resolve() for path in (source, output, errors) if path is not None]
        if len(set(paths)) < len(paths):
            raise UserError(f"--output={output}: input, output and errors must be different files")
        self._model = model
        self._input = InputFile(source)
        self._outputs: list[OutputFile] = []
        try:
            for path in (output, errors):
                if path is not None:
                    self._outputs.append(OutputFile(path, LINE_BEGINNING))
            self._todo = self._undone()
        except UserError:
            self.close()
            raise
        self.counts = Counts(len(self._input), before=len(self._input) - len(self._todo))

    @property
    def structured(self) -> bool:
        """Whether the engine will need `ServedModel.grammars`."""
        return self._input.structured

    def engine_config(self, **settings: Any) -> EngineConfig:
        """What suits the job on this machine: a cache as large as there is room for, if so much is needed.

        Args:
          **settings: of `EngineConfig`; they come first.
        """
        chosen = EngineConfig(**settings)
        if chosen.cache_tokens is not None:
            return chosen
        longest = chosen.max_length or self._model.config.max_length
        dtype = chosen.dtype if chosen.cache_dtype is None else chosen.cache_dtype
        tokens = cache_tokens(self._model.config, dtype, longest, chosen.max_running, self._model.mesh)
        return dataclasses.replace(chosen, cache_tokens=tokens)

    def run(
        self,
        engine: Front,
        *,
        seed: int = 0,
        window: int = _WINDOW,
        console: rich.console.Console | None = None,
    ) -> JobResult:
        """Answers what is left. An interrupt (Ctrl-C) ends it with all that is finished kept.

        Args:
          engine: with nothing else to do.
          seed: requests that give no seed get one from this and their ``custom_id``.
          window: most lines that the engine is told of at once; of all, if its schedule is ``planned``.
          console: where progress is shown; ``None``: standard error.
        """
        self._engine, self._seed = engine, seed
        self._samples: dict[int, tuple[_Line, SampleText]] = {}  # by the id of the engine's sequence
        self._open = 0
        interrupted = False
        with Progress(self.counts, engine.statistics, console) as progress:
            self._progress = progress
            for output in self._outputs:
                if output.torn:
                    output.mend()
                    progress.note(f"{output.path}: the last line was incomplete and is answered anew")
            if self.counts.before:
                progress.note(f"{self.counts.before:,} of {self.counts.total:,} requests were done before")
            try:
                self._answer_all(window)
            except KeyboardInterrupt:
                interrupted = True
            finally:
                self.close()
        result = JobResult(self.counts, engine.statistics, progress.seconds, interrupted)
        progress.note(_summary(result, [output.path for output in self._outputs]))
        return result

    def close(self) -> None:
        """Closes the files, with all that was written on the disk; `run` does so at its end."""
        for output in self._outputs:
            output.close()
        self._input.close()

    def _undone(self) -> list[int]:
        places = {digest: index for index, digest in enumerate(self._input.digests)}
        done = set()
        for output in self._outputs:
            for number, record in output.records():
                digest = digest_of(record)
                if digest not in places:
                    raise UserError(
                        f"{output.path}:{number}: answers no line of {self._input.path} as it is now: choose another "
                        "output, or remove this one to answer everything anew"
                    )
                body = (record.get("response") or {}).get("body") or {}
                if body.get("model", self._model.name) != self._model.name:
                    raise UserError(
                        f"{output.path}:{number}: was written by the model {body['model']!r}, and this is "
                        f"{self._model.name!r}: choose another output, or remove this one"
                    )
                done.add(places[digest])
        return [index for index in range(len(self._input)) if index not in done]

    def _answer_all(self, window: int) -> None:
        planned = self._engine.engine.schedule == "planned"
        ahead = iter(() if planned else self._todo)
        if planned:
            self._queue_all()
        more = True
        while more or self._engine.unfinished:
            while more and self._open < window:
                index = next(ahead, None)
                if index is None:
                    more = False
                elif (read := self._read(index)) is not None:
                    self._queue(*read)
            for update, logprobs in self._engine.step():
                self._take(update, logprobs)
            self._progress.update()

    def _read(self, index: int) -> tuple[int, str, TextRequest] | None:
        """A line as a request; ``None``: it is none, which has been said."""
        name = None
        try:
            line = self._input.read(index)
            name = line.custom_id
            read = reader(line.url)
            check_model(line.body, self._model)
            if line.body.get("stream"):
                raise FieldError("stream", "must be false in a batch: answers come as a whole")
            longest = self._engine.engine.max_length
            request = read(line.body, self._model, max_length=longest, seed=default_seed(name, self._seed))
        except UserError as error:
            self._fail(index, error.custom_id if isinstance(error, LineError) else name, error)
            return None
        # Many may wait: lists would take eight times the room.
        prompts = tuple(array.array("i", prompt) for prompt in request.prompts)
        return index, name, dataclasses.replace(request, prompts=prompts)

    def _queue(self, index: int, custom_id: str, request: TextRequest) -> None:
        samples: list[list[Sequence]] = []
        try:
            for number, (prompt, sampling) in enumerate(zip(request.prompts, request.sampling, strict=True)):
                samples.append(self._engine.add(prompt, sampling, f"{index}.{number}"))
        except UserError as error:
            for each in samples:
                self._engine.cancel(each[0].request.id)
            self._fail(index, custom_id, error)
        else:
            self._expect(index, custom_id, request, samples)

    def _queue_all(self) -> None:
        """Tells the engine of the whole job at once, so that it can plan."""
        lines = [read for index in self._todo if (read := self._read(index)) is not None]
        try:
            queued = self._add_all(lines)
        except UserError:  # the engine refuses one of them; the others are planned nevertheless
            lines = [line for line in lines if self._possible(*line)]
            queued = self._add_all(lines)
        ahead = iter(queued)
        for line in lines:
            self._expect(*line, list(itertools.islice(ahead, len(line[2].prompts))))

    def _add_all(self, lines: list[tuple[int, str, TextRequest]]) -> list[list[Sequence]]:
        places = [(line, number) for line in lines for number in range(len(line[2].prompts))]
        return self._engine.add_all(
            [request.prompts[number] for (_, _, request), number in places],
            [request.sampling[number] for (_, _, request), number in places],
            [f"{index}.{number}" for (index, _, _), number in places],
        )

    def _possible(self, index: int, custom_id: str, request: TextRequest) -> bool:
        """Whether the engine takes a line; it is not queued."""
        for prompt, sampling in zip(request.prompts, request.sampling, strict=True):
            try:
                self._engine.cancel(self._engine.add(prompt, sampling, "trial")[0].request.id)
            except UserError as error:
                self._fail(index, custom_id, error)
                return False
        return True

    def _expect(self, index: int, custom_id: str, request: TextRequest, samples: list[list[Sequence]]) -> None:
        line = _Line(index, custom_id, request, [each[0] for each in samples])
        for number, each in enumerate(samples):
            for sequence in each:
                sample = SampleText(self._model, request, number, sequence.index)
                line.samples.append(sample)
                self._samples[id(sequence)] = (line, sample)
        self._open += 1

    def _take(self, update: Update, logprobs: list[TokenLogprobs] | None) -> None:
        line, sample = self._samples.get(id(update.sequence), (None, None))
        if line is None or sample is None:
            return  # it has ended here before the engine heard of that
        stop_token = update.finish_reason is FinishReason.STOP
        before = len(sample.tokens)
        if line.request.sampling[sample.prompt].prompt_logprobs is not None and not sample.prompt_logprobs:
            sample.prompt_logprobs = self._engine.prompt_logprobs(update.sequence.request.id) or ()
        sample.push(update.tokens[:-1] if stop_token else update.tokens, logprobs)
        self.counts.written += len(sample.tokens) - before
        if update.finish_reason is not None:
            sample.end(update.finish_reason)
            line.failed |= sample.finish_reason is None
        elif sample.stopped:
            self._engine.cancel(update.sequence.request.id, update.sequence.index)
        else:
            return
        del self._samples[id(update.sequence)]
        line.ended += 1
        if line.ended == len(line.samples):
            self._finish(line)

    def _finish(self, line: _Line) -> None:
        self._open -= 1
        digest = self._input.digests[line.index]
        if line.failed:
            error = UserError("the engine could not go on with this request; the others were not touched")
            self._fail(line.index, line.custom_id, error, status=500)
            return
        cached = [sequence.cached for sequence in line.firsts]
        body = answer(digest.hex(), self._model, line.request, line.samples, cached)
        self._outputs[0].append(answer_line(digest, line.custom_id, body))
        self.counts.answered += 1

    def _fail(self, index: int, custom_id: str | None, error: UserError, status: int = 400) -> None:
        where = self._input.where(index)
        self._outputs[-1].append(error_line(self._input.digests[index], custom_id, error, where, status))
        self.counts.failed += 1
        self._progress.error(f"{where}: {error}")


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """While it lasts, SIGTERM interrupts as Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _summary(result: JobResult, paths: Iterable[Path]) -> str:
    counts, statistics = result.counts, result.statistics
    parts = [f"{counts.answered:,} requests answered, {counts.failed:,} failed"]
    if counts.before:
        parts[0] += f" ({counts.before:,} of {counts.total:,} were done before)"
    parts.append(f"{statistics.prompt:,} prompt tokens, {hit_share(statistics):.0%} of them cached")
    speed = counts.written / max(result.seconds, 1e-9)
    guessed = guessed_share(statistics)
    guesses = "" if guessed is None else f"{guessed:.0%} of them guessed, "
    parts.append(f"{counts.written:,} tokens written in {result.seconds:.1f} s, {guesses}{speed:,.0f} tokens/s")
    parts.append(" and ".join(map(str, paths)))
    if result.interrupted:
        left = counts.total - counts.done
        parts.insert(0, f"interrupted: {left:,} of {counts.total:,} requests are left; the same command goes on")
    return "; ".join(parts)
