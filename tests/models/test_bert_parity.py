"""BERT's other heads and padding against transformers, which `test_huggingface_parity` leaves out; needs torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml.models import SelfAttention, module_of
from ml.models.huggingface import load_config, load_params, save_pretrained

pytestmark = pytest.mark.parity

LENGTH, TOLERANCE = 24, 1e-4
SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 32}


def build(transformers, name, **fields):
    """A tiny model of class ``name``, in all of whose weights its logits have a say."""
    import torch

    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, **fields)
    model = getattr(transformers, name)._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model.eval()


def inputs():
    rng = np.random.default_rng(0)
    lengths, second = np.array([[LENGTH], [17], [9]]), np.array([[10], [8], [3]])
    column = np.arange(LENGTH)
    real = column < lengths
    types = ((column >= second) & real).astype(np.int32)
    return np.where(real, rng.integers(1, 96, real.shape), 0).astype(np.int32), real.astype(np.int32), types


def ours(folder, method):
    config = load_config(folder)
    params, model = load_params(folder, config), module_of(config)
    tokens, real, types = inputs()

    @jax.jit
    def apply(params):
        strategy = SelfAttention(jnp.asarray(real), causal=False)
        hidden, _ = model.apply({"params": params}, tokens, strategy, types)
        return model.apply({"params": params}, hidden, method=method)

    return np.asarray(apply(params))


def theirs(model):
    import torch

    tokens, real, types = (torch.from_numpy(x.astype(np.int64)) for x in inputs())
    with torch.no_grad():
        return model(tokens, attention_mask=real, token_type_ids=types)


def test_both_heads_of_pretraining_with_padding_and_token_types(tmp_path, transformers):
    model = build(transformers, "BertForPreTraining")
    model.save_pretrained(tmp_path / "in")
    out, real = theirs(model), inputs()[1] > 0
    expected = out.prediction_logits.numpy()[real]
    assert expected.std() > 1.0 and out.seq_relationship_logits.std() > 0.1
    assert np.abs(ours(tmp_path / "in", "logits")[real] - expected).max() <= TOLERANCE
    of_sentences = ours(tmp_path / "in", "next_sentence_logits")
    assert np.abs(of_sentences - out.seq_relationship_logits.numpy()).max() <= TOLERANCE


def test_a_classifier_goes_in_and_out(tmp_path, transformers):
    model = build(transformers, "BertForSequenceClassification", num_labels=5)
    model.save_pretrained(tmp_path / "in")
    expected = theirs(model).logits.numpy()
    assert expected.shape == (3, 5) and expected.std() > 0.5
    assert np.abs(ours(tmp_path / "in", "class_logits") - expected).max() <= TOLERANCE

    config = load_config(tmp_path / "in")
    save_pretrained(tmp_path / "out", config, load_params(tmp_path / "in", config))
    back, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert back.config.num_labels == 5 and not report["missing_keys"] and not report["unexpected_keys"]
    assert np.abs(theirs(back).logits.numpy() - expected).max() <= 1e-6


def test_the_old_names_of_norms(tmp_path, transformers):
    """Files converted from TensorFlow, such as the published ``bert-base-uncased``."""
    from safetensors.numpy import load_file, save_file

    model = build(transformers, "BertForPreTraining")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    old = {}
    for name, tensor in stored.items():
        if "LayerNorm" in name:
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        old[name] = tensor
    old["cls.predictions.decoder.weight"] = stored["bert.embeddings.word_embeddings.weight"]
    old["bert.embeddings.position_ids"] = np.arange(32, dtype=np.int64)[None]
    save_file(old, tmp_path / "model.safetensors")
    expected = theirs(model).seq_relationship_logits.numpy()
    assert np.abs(ours(tmp_path, "next_sentence_logits") - expected).max() <= TOLERANCE
