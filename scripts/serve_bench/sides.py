"""The programs that are compared, each in a process of its own that works only while the others wait."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from serve_bench.workloads import JOBS, Job

_ROOT = Path(__file__).resolve().parents[2]


class Side:
    """A process that answers a line of JSON for each line it is sent."""

    def __init__(self, name: str, python: str, model: Path, threads: int):
        self.name = name
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
        path = os.pathsep.join((str(_ROOT), str(_ROOT / "scripts")))
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
        command = ["taskset", "-c", cores, python, "-m", "serve_bench.sides", name, str(model), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, job: str, requests: int, **options: Any) -> dict[str, Any]:
        """Does a job; returns ``seconds``, ``tokens`` of each request, and what the side has to say besides."""
        from ml.errors import UserError

        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"job": job, "requests": requests, **options}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise UserError(f"the process of {self.name} ended; see its message above")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate("")


def work(name: str, model: str, threads: int) -> None:
    """The body of a side's process."""
    out, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    answer: Any = {"megabatch": _Megabatch, "transformers": _Transformers}[name](model, threads)
    for line in sys.stdin:
        asked = json.loads(line)
        job = JOBS[asked.pop("job")](asked.pop("requests"))
        begin = time.perf_counter()
        try:
            result = answer(job, **asked)
        except Exception as error:  # a peer that cannot do it is part of the result
            result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        result = {"seconds": time.perf_counter() - begin} | result
        print(json.dumps(result), file=out, flush=True)


class _Megabatch:
    """This project's engine, warmed up; nothing is cached from one turn to the next."""

    def __init__(self, model: str, threads: int):
        del threads
        import jax

        from ml.checkpoint.pretrained import load_model

        self.version = f"jax {jax.__version__}"
        self._config, self._params, _ = load_model(Path(model), dtype="float32")
        self._engines: dict[str, Any] = {}

    def __call__(self, job: Job, **settings: Any) -> dict[str, Any]:
        from ml.serve import SamplingParams

        engine = self._engine(settings)
        engine.reset()
        before = dataclasses.replace(engine.statistics)
        begin = time.perf_counter()
        sampling = SamplingParams(max_tokens=job.new_tokens, temperature=0.0)
        completions = engine.generate(job.prompts, sampling)
        seconds = time.perf_counter() - begin
        after = engine.statistics
        return {
            "seconds": seconds,
            "tokens": [each[0].tokens for each in completions],
            "cached_tokens": after.cached - before.cached,
            "steps": after.steps - before.steps,
            "preemptions": after.preemptions - before.preemptions,
            "compilations": after.compilations,
            "version": self.version,
        }

    def _engine(self, settings: dict[str, Any]) -> Any:
        from ml.serve import Engine, EngineConfig, SamplingParams

        key = json.dumps(settings, sort_keys=True)
        if key not in self._engines:
            engine = Engine(self._config, self._params, EngineConfig(**settings))
            engine.warm_up((SamplingParams(temperature=0.0),))
            self._engines[key] = engine
        return self._engines[key]


class _Transformers:
    """Hugging Face transformers, as its users run it: the way is one of those in `WAYS`."""

    def __init__(self, model: str, threads: int):
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        self.version = f"torch {torch.__version__}, transformers {transformers.__version__}"
        load = transformers.AutoModelForCausalLM.from_pretrained
        self._model = load(model, dtype=torch.float32, attn_implementation="sdpa").eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    def __call__(self, job: Job, way: str, batch: int) -> dict[str, Any]:
        import torch

        # Its continuous batching works in a thread of its own, which must not be given this mode's tensors.
        with torch.no_grad() if way == "generate_batch" else torch.inference_mode():
            tokens = getattr(self, f"_{way}")(job, batch)
        if any(len(each) != job.new_tokens for each in tokens) or len(tokens) != len(job.prompts):
            raise RuntimeError("not every request got its tokens")
        return {"tokens": tokens, "version": self.version}

    def _padded(self, job: Job, batch: int) -> list[list[int]]:
        """Sorted by length, padded to the longest of a batch."""
        import torch

        order = sorted(range(len(job.prompts)), key=lambda i: -len(job.prompts[i]))
        tokens: dict[int, list[int]] = {}
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            longest = max(len(job.prompts[i]) for i in chosen)
            ids = torch.zeros((len(chosen), longest), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                prompt = job.prompts[i]
                ids[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask[row, longest - len(prompt) :] = 1
            out = self._model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=job.new_tokens
            )
            tokens |= {i: out[row, longest:].tolist() for row, i in enumerate(chosen)}
        return [tokens[i] for i in range(len(order))]

    def _prefix_once(self, job: Job, batch: int) -> list[list[int]]:
        """The keys and values of the prefix computed once, and repeated for every batch."""
        import copy

        import torch
        import transformers

        cache = transformers.DynamicCache(config=self._model.config)
        prefix = torch.tensor([job.prompts[0][: job.prefix]])
        self._model(input_ids=prefix, past_key_values=cache, use_cache=True)
        tokens: list[list[int]] = []
        for start in range(0, len(job.prompts), batch):
            ids = torch.tensor(job.prompts[start : start + batch])
            repeated = copy.deepcopy(cache)
            repeated.batch_repeat_interleave(len(ids))
            out = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=repeated,
                do_sample=False,
                max_new_tokens=job.new_tokens,
            )
            tokens += out[:, ids.shape[1] :].tolist()
        return tokens

    def _generate_batch(self, job: Job, batch: int) -> list[list[int]]:
        """Its continuous batching."""
        del batch
        import transformers

        config = transformers.GenerationConfig(
            max_new_tokens=job.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        out = self._model.generate_batch(inputs=job.prompts, generation_config=config)
        return [out[key].generated_tokens for key in sorted(out, key=lambda key: int(key.split("_")[-1]))]


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]))
