"""A model without parameters, for what looks at text alone."""

from ml.data.tokenizer import Tokenizer
from ml.models import TransformerConfig
from ml.serve.text import ChatTemplate, ServedModel

CHAT = (
    "{% if messages[0].role == 'tool' %}{{ raise_exception('a tool cannot begin') }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood }}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def text_model(chat=CHAT, vocab_size=300, max_length=64):
    tokenizer = Tokenizer.train(["Fünf große Äpfel, assistant: user: 3 €. " * 20], vocab_size)
    config = TransformerConfig(
        vocab_size=vocab_size,
        num_layers=1,
        embed_dim=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=24,
        max_length=max_length,
    )
    template = None if chat is None else ChatTemplate({"default": chat}, {}, "test")
    return ServedModel("small", config, None, tokenizer, [tokenizer.bos_id], frozenset({tokenizer.eos_id}), template)
