"""A server of a tiny model on a free port, within the process that tests it."""

import contextlib
import threading

import jax
import uvicorn

from ml.data.tokenizer import Tokenizer
from ml.models import Transformer, TransformerConfig, init_params
from ml.serve.api.app import create_app
from ml.serve.api.settings import ServerSettings
from ml.serve.engine import Engine, EngineConfig
from ml.serve.text import ChatTemplate, ServedModel

CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
CONFIG = TransformerConfig(
    vocab_size=300,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    max_length=512,
    # Large, so that greedy text is lively.
    init_stddev=0.3,
)
# One sequence at a time: every other number of rows would be a program to compile.
SMALL = EngineConfig(page_size=16, max_running=1, token_budget=16, decode_steps=1, share="never")


def tiny_model(chat=CHAT):
    params = jax.jit(init_params, static_argnums=0)(Transformer(CONFIG), jax.random.key(3))
    tokenizer = Tokenizer.train(["Fünf große Äpfel für 3 €: naïve 漢字 🎉. " * 20], CONFIG.vocab_size)
    template = None if chat is None else ChatTemplate({"default": chat}, {}, "test")
    return ServedModel("tiny", CONFIG, params, tokenizer, [tokenizer.bos_id], frozenset({tokenizer.eos_id}), template)


class TinyServer:
    """The application of a tiny model; `listening` puts it on a port."""

    def __init__(self, *, capacity=64, engine=None, **settings):
        self.model = tiny_model()
        self.engine = engine or Engine(CONFIG, self.model.params, SMALL, stop_ids=self.model.stop_ids)
        self.settings = ServerSettings(**{"max_length": CONFIG.max_length, **settings})
        self.app = create_app(self.model, self.engine, self.settings, capacity=capacity)
        self.driver = self.app.state.driver

    @contextlib.contextmanager
    def listening(self):
        """Gives the address."""
        server = uvicorn.Server(uvicorn.Config(self.app, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        started = threading.Event()
        startup = server.startup

        async def tell(sockets=None):
            await startup(sockets)
            started.set()

        server.startup = tell
        thread.start()
        try:
            assert started.wait(30)
            port = server.servers[0].sockets[0].getsockname()[1]
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(30)
        assert not thread.is_alive()
        load = self.engine.load
        assert (load.running, load.waiting, load.held_pages) == (0, 0, 0), load
