"""CLIP against transformers: both embeddings, the temperature, in and out again; needs torch."""

import importlib
import json

import jax
import numpy as np
import pytest

from ml.errors import UserError
from ml.models.huggingface import load_config, load_params, save_pretrained
from ml.models.two_tower import TwoTower

pytestmark = pytest.mark.parity

END, TOLERANCE = 95, 1e-5
TEXT = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "eos_token_id": END}
TEXT |= {"num_attention_heads": 4, "max_position_embeddings": 12}
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 12, "patch_size": 4}
LENGTHS = (12, 7, 3)


@pytest.fixture
def transformers(request):
    """Missing is a failure where parity was asked for, and a skip in a run of everything."""
    if "parity" in request.config.option.markexpr:
        return importlib.import_module("transformers")
    return pytest.importorskip("transformers")


def build(transformers, **more):
    """A tiny model in all of whose weights its embeddings have a say."""
    import torch

    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=TEXT | more, vision_config=VISION | more, projection_dim=16)
    model = transformers.CLIPModel._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.normal_(0.0, 0.3)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model.eval()


def inputs():
    rng = np.random.default_rng(0)
    column, lengths = np.arange(12), np.array(LENGTHS)[:, None]
    tokens = np.where(column < lengths - 1, rng.integers(0, END, (3, 12)), END).astype(np.int32)
    return rng.uniform(size=(3, 12, 12, 3)).astype(np.float32), tokens, (column < lengths).astype(np.int32)


def theirs(model):
    import torch

    pixels, tokens, segments = inputs()
    # What its image processor gives it.
    images = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    images = images.astype(np.float32)
    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(tokens.astype(np.int64)),
            pixel_values=torch.from_numpy(images.transpose(0, 3, 1, 2)),
            attention_mask=torch.from_numpy(segments.astype(np.int64)),
        )
    return out.image_embeds.numpy(), out.text_embeds.numpy(), out.logits_per_image.numpy()


def ours(folder):
    config = load_config(folder)
    params, model = load_params(folder, config), TwoTower(config)
    x, y = jax.jit(lambda params, *batch: model.apply({"params": params}, *batch))(params, *inputs())
    scale = np.exp(np.asarray(params["logit"]["scale"]))
    return np.asarray(x), np.asarray(y), scale * np.asarray(x @ y.T)


def compare(found, expected):
    for mine, other in zip(found[:2], expected[:2], strict=True):
        assert mine.std() > 0.1 and np.abs(np.diff(other, axis=0)).max() > 0.02
        assert np.abs(mine - other).max() <= TOLERANCE
    assert np.abs(found[2] - expected[2]).max() <= 20 * TOLERANCE


def test_embeddings_and_similarities(tmp_path, transformers):
    model = build(transformers)
    model.save_pretrained(tmp_path)
    compare(ours(tmp_path), theirs(model))


def test_out_and_in_again_in_transformers(tmp_path, transformers):
    model = build(transformers, hidden_act="gelu")
    model.save_pretrained(tmp_path / "in")
    config = load_config(tmp_path / "in")
    assert config.text.activation == config.image.activation == "gelu"
    save_pretrained(tmp_path / "out", config, load_params(tmp_path / "in", config))
    back, report = transformers.CLIPModel.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    processor = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert processor["image_mean"] == list(config.image.pixel_mean) and processor["size"] == {"shortest_edge": 12}
    assert load_config(tmp_path / "out") == config
    assert not report["missing_keys"] and not report["unexpected_keys"]
    compare(theirs(back), theirs(model))
    with pytest.raises(UserError, match="does_nothing"):
        values = json.loads((tmp_path / "in/config.json").read_text())
        values["vision_config"]["does_nothing"] = 3
        (tmp_path / "in/config.json").write_text(json.dumps(values))
        load_config(tmp_path / "in")
