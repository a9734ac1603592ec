"""Serves a model over HTTP, in OpenAI's form."""

import dataclasses
import os
import sys
from typing import Any

import app
from absl import flags
from compiled import keep_compiled_programs

from ml.errors import UserError
from ml.serve import EngineConfig, SamplingParams, ServedModel, StructuredOutput, make_engine, serving_mesh
from ml.serve.batch.sizing import cache_tokens
from ml.serve.placement import MeshError
from ml.serve.sampling import MAX_LOGPROBS
from ml.serve.text.served_model import WEIGHTS, serving_dtype

USAGE = """Serves a model over HTTP as OpenAI does: the work directory of a training run, or a Hugging Face folder.

Examples:
  python scripts/serve.py --model=runs/quickstart
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "def main("}'

  python scripts/serve.py --model=Qwen3-0.6B --host=0.0.0.0 --api_key=secret
  client = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="secret")
"""

_MODEL = flags.DEFINE_string("model", None, "Folder of the model.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of a work directory (default: the newest).", lower_bound=0)
_NAME = flags.DEFINE_string("served_model_name", None, "What clients call the model (default: the folder's name).")
_TEMPLATE = flags.DEFINE_string("chat_template", None, "File with a Jinja template (default: the model's own).")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0: all.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0: any that is free.", 0, 65535)
_API_KEY = flags.DEFINE_string(
    "api_key", None, "What clients must send as bearer token (default: MEGABATCH_API_KEY, or nothing)."
)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", None, "Most tokens of prompt and completion (default: the model's).", lower_bound=1
)
_MAX_RUNNING = flags.DEFINE_integer("max_running", 64, "Most sequences that run at once, in each copy.", lower_bound=1)
_MAX_QUEUE = flags.DEFINE_integer(
    "max_queue", 1024, "Most sequences that wait; clients beyond get status 429.", lower_bound=0
)
_CACHE_TOKENS = flags.DEFINE_integer(
    "cache_tokens",
    None,
    "Tokens that the cache holds (default: those of all that run, or what there is room for).",
    lower_bound=1,
)
_WEIGHTS = flags.DEFINE_enum("weights", None, WEIGHTS, "How weights are kept (default: as this machine computes).")
_CACHE_DTYPE = flags.DEFINE_enum(
    "cache_dtype", None, ["float32", "bfloat16", "int8", "float8_e4m3fn"], "Of keys and values (default: the model's)."
)
_TOKEN_BUDGET = flags.DEFINE_integer("token_budget", 512, "Most tokens fed in a step.", lower_bound=1)
_DECODE_STEPS = flags.DEFINE_integer("decode_steps", 8, "Most tokens between two looks: the stream's grain.", 1)
_SPECULATE = flags.DEFINE_integer(
    "speculate", 0, "Most tokens guessed and verified at once, where texts repeat themselves; 0: none.", lower_bound=0
)
_SPECULATE_NGRAM = flags.DEFINE_integer("speculate_ngram", 3, "Longest n-gram looked up for a guess.", lower_bound=1)
_SCHEDULE = flags.DEFINE_enum("schedule", "fifo", ["fifo", "prefix"], "Who goes first; prefix: whose prompt is cached.")
_TENSOR = flags.DEFINE_integer("tensor", 1, "Devices that share one copy of the model.", lower_bound=1)
_DATA = flags.DEFINE_integer("data", 1, "Copies of the model, each with a part of the requests.", lower_bound=1)
_WARM_UP = flags.DEFINE_bool("warm_up", True, "Compile before the first request comes.")
_OPTIONS: dict[str, dict[str, Any]] = {
    "logprobs": {"logprobs": MAX_LOGPROBS},
    "penalties": {"presence_penalty": 1.0},
    "logit_bias": {"logit_bias": dict.fromkeys(range(8), 1.0)},
    "structured_output": {"structured_output": StructuredOutput(json_object=True)},
}
_WARM_UP_FOR = flags.DEFINE_list(
    "warm_up_for", [], f"Then also compile for requests with any of {', '.join(_OPTIONS)}; else the first ones wait."
)
_TIMEOUT = flags.DEFINE_float("request_timeout", 600.0, "Most seconds that a request may take.", lower_bound=0.001)
_DRAIN = flags.DEFINE_float("drain_seconds", 30.0, "Most seconds that requests get after SIGTERM.", lower_bound=0)
_MAX_BODY = flags.DEFINE_integer("max_body_mb", 32, "Largest body of a request, in MiB.", lower_bound=1)
_POOLING = flags.DEFINE_enum("pooling", "mean", ["mean", "last"], "What of a text's hidden states is its embedding.")


def main() -> None:
    """Loads, listens, serves until a signal."""
    # Here, so that without the extra `serve` the error is one line.
    from ml.serve.api.app import create_app
    from ml.serve.api.listening import listen, serve
    from ml.serve.api.settings import ServerSettings

    if not _MODEL.value:
        raise UserError("--model is missing: give a work directory or a Hugging Face folder (see serve.py --help)")
    if unknown := set(_WARM_UP_FOR.value) - set(_OPTIONS):
        raise UserError(f"--warm_up_for={unknown.pop()}: choose from {', '.join(_OPTIONS)}")
    if _WARM_UP_FOR.value and not _WARM_UP.value:
        raise UserError("--warm_up_for says what to warm up for, and --nowarm_up not to: give one of them")
    bound = listen(_HOST.value, _PORT.value)  # first, since loading takes its time
    keep_compiled_programs()
    dtype = serving_dtype(_WEIGHTS.value)
    try:
        model = ServedModel.load(
            _MODEL.value,
            step=_STEP.value,
            weights=_WEIGHTS.value,
            chat_template=_TEMPLATE.value,
            mesh=serving_mesh(data=_DATA.value, tensor=_TENSOR.value),
        )
    except MeshError as error:
        raise UserError(f"--{error}") from error
    except UserError as error:
        flag = "chat_template" if _TEMPLATE.value and str(error).startswith(_TEMPLATE.value) else "model"
        raise UserError(f"--{flag}: {error}") from error
    if _NAME.value:
        model = dataclasses.replace(model, name=_NAME.value)
    longest = _MAX_LENGTH.value or model.config.max_length
    cached = dtype if _CACHE_DTYPE.value is None else _CACHE_DTYPE.value
    tokens = _CACHE_TOKENS.value or cache_tokens(model.config, cached, longest, _MAX_RUNNING.value, model.mesh)
    engine = make_engine(
        model.config,
        model.params,
        EngineConfig(
            max_length=_MAX_LENGTH.value,
            cache_tokens=tokens,
            max_running=_MAX_RUNNING.value,
            token_budget=_TOKEN_BUDGET.value,
            decode_steps=_DECODE_STEPS.value,
            speculate=_SPECULATE.value,
            speculate_ngram=_SPECULATE_NGRAM.value,
            schedule="prefix" if _SCHEDULE.value == "prefix" else "fifo",
            dtype=dtype,
            cache_dtype=_CACHE_DTYPE.value,
        ),
        stop_ids=model.stop_ids,
        grammars=model.grammars(),
        mesh=model.mesh,
    )
    if _WARM_UP.value:
        print("compiling ahead", file=sys.stderr, flush=True)
        engine.warm_up(_samplings(_WARM_UP_FOR.value))
    settings = ServerSettings(
        max_length=min(longest, tokens),
        api_key=_API_KEY.value or os.environ.get("MEGABATCH_API_KEY") or None,
        request_timeout=_TIMEOUT.value,
        max_body=_MAX_BODY.value * 2**20,
        pooling="last" if _POOLING.value == "last" else "mean",
    )
    server = create_app(model, engine, settings, capacity=_DATA.value * _MAX_RUNNING.value + _MAX_QUEUE.value)
    host, port = bound.getsockname()[:2]

    def ready() -> None:
        print(f"serving {model.name} on http://{host}:{port}", file=sys.stderr, flush=True)

    serve(server, bound, drain_seconds=_DRAIN.value, ready=ready)


def _samplings(names: list[str]) -> list[SamplingParams]:
    """What requests may ask for: nothing of the kind, or all of it, which does for a part as well."""
    asked: dict[str, Any] = {}
    for name in names:
        asked |= _OPTIONS[name]
    return [SamplingParams(), *([SamplingParams(**asked)] if asked else [])]


if __name__ == "__main__":
    app.run(main, usage=USAGE)
