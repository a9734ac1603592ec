"""`scripts/zero_shot.py`: a two-tower model as a work directory and as a Hugging Face folder, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from script_processes import error_of, run
from training_cases import initial_params

from ml.checkpoint.pretrained import load_two_tower, save_workdir
from ml.data import Tokenizer
from ml.errors import UserError
from ml.models import TwoTowerConfig, ViTConfig, text_tower
from ml.models.huggingface import save_pretrained

CONFIG = TwoTowerConfig(
    ViTConfig(image_size=8, patch_size=4, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32, patch_bias=False,
              pre_norm=True),
    text_tower(vocab_size=300, num_layers=1, embed_dim=16, num_heads=2, max_length=16),
    features=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model in both forms, images of two classes, and sentences."""
    base = tmp_path_factory.mktemp("zero_shot")
    Tokenizer.train(["a photo of red and of blue"] * 2, 300).save(base / "tokenizer")
    params = jax.tree.map(jnp.asarray, initial_params(CONFIG))
    tokenizer = base / "tokenizer/tokenizer.json"
    save_workdir(base / "work", CONFIG, params, tokenizer)
    save_pretrained(base / "hf", CONFIG, params, tokenizer)
    rng = np.random.default_rng(0)
    for name in ("blue", "red"):
        (base / "images" / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(
                base / "images" / name / f"{number}.png"
            )
    (base / "sentences.txt").write_text("a photo of {}\nof {} a photo\n")
    return base


def test_both_forms_give_the_same_model(folders):
    work, hf = (load_two_tower(folders / form) for form in ("work", "hf"))
    assert work[0] == hf[0] == CONFIG
    jax.tree.map(np.testing.assert_array_equal, work[1], hf[1])
    with pytest.raises(UserError, match="no checkpoint steps"):
        load_two_tower(folders / "hf", step=3)


@pytest.mark.slow  # a process
def test_images_in_folders_are_classified(folders):
    arguments = (f"--images={folders / 'images'}", f"--templates={folders / 'sentences.txt'}", "--batch_size=4")
    done = run("zero_shot.py", f"--model={folders / 'hf'}", *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["images"], found["classes"], found["templates"], found["top5"]) == (6, 2, 2, 1.0)
    assert 0 <= found["top1"] <= 1


@pytest.mark.slow  # a process each
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--images is missing"),
        (["--images=nowhere"], "--images.path=nowhere: does not exist"),
        (["--images={}/images", "--templates={}/tokenizer/tokenizer.json"], "must have one {}, where the name goes"),
        (["--images={}/images", "--names={}/sentences.txt"], "cannot be read as a JSON object"),
    ],
)
def test_mistakes_are_one_line(folders, arguments, message):
    given = [argument.replace("{}", str(folders)) for argument in arguments]
    assert message in error_of(run("zero_shot.py", f"--model={folders / 'work'}", *given))
