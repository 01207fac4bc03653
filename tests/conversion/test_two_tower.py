"""Both towers of SigLIP: texts give the same numbers there and here, and go on."""

import dataclasses
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
import shapes_run
import torch_libraries
from big_vision_bit import random_variables
from conversion_cases.two_tower import OURS, towers
from etils import epath
from foreign_models import relative_difference

pytestmark = pytest.mark.parity

pytest.importorskip("torch")
torch_libraries.import_torchvision()
pytest.importorskip("transformers")
import both_sides  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from big_vision_lite import predict, train  # noqa: E402
from big_vision_lite.config import Init, TrainConfig  # noqa: E402
from big_vision_lite.conversion import foreign  # noqa: E402
from big_vision_lite.data.ops import Decode, Resize, Tokenize  # noqa: E402
from big_vision_lite.data.ops.text import TooLong  # noqa: E402
from big_vision_lite.data.pipeline import Stream  # noqa: E402
from big_vision_lite.models.vit import ViT  # noqa: E402
from big_vision_lite.objectives.image_text import SigLIP  # noqa: E402
from big_vision_lite.recipes import command_line  # noqa: E402
from big_vision_lite.runs import load  # noqa: E402
from big_vision_lite.schedules import Constant  # noqa: E402
from big_vision_lite.training import state as state_lib  # noqa: E402
from big_vision_lite.training.optimizers import SGD  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tools"))
import convert_checkpoint  # noqa: E402

IDS = np.random.default_rng(0).integers(0, 11, (3, 5))


def compare(model, variables, theirs, size):
    """Asserts equal embeddings of images and texts, and equal logits."""
    image = both_sides.pixels(size)
    params, _ = state_lib.split_variables(variables)
    ours = jax.jit(model.apply)({"params": params}, image, IDS.astype(np.int32))
    scaled = torch.from_numpy(np.moveaxis(np.asarray(ours["image"]), -1, 1).copy())
    with torch.no_grad():
        found = theirs(input_ids=torch.from_numpy(IDS), pixel_values=scaled)
    logits = ours["image_embedding"] @ ours["text_embedding"].T
    logits = logits * ours["temperature"] + ours["bias"]
    for mine, other in (
        (ours["image_embedding"], found.image_embeds),
        (ours["text_embedding"], found.text_embeds),
        (logits, found.logits_per_image),
    ):
        assert relative_difference(mine, other.numpy()) <= both_sides.BOUND


def test_texts_and_images_of_theirs_give_the_same_logits_here(tmp_path):
    found = both_sides.imported("HF SigLIP, both", tmp_path)
    assert found.model.text_tower.width == 8 and found.model.features == 16
    compare(found.model, found.variables, found.theirs, (24, 24))


def test_texts_and_images_of_ours_give_the_same_logits_there(tmp_path):
    ours = OURS["HF SigLIP, both"]
    variables = random_variables(ours.model, ours.size, seed=5)
    _, theirs = both_sides.put(ours, variables, tmp_path / "out")
    compare(ours.model, variables, theirs, ours.size)


@dataclasses.dataclass(kw_only=True)
class Captioned:
    """Random pixels and a letter for each."""

    class_names = ()
    fingerprint = "captioned"

    def __len__(self):
        return 8

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (24, 24, 3), np.uint8)
        return {"image": image, "caption": "ab"[index % 2]}

    def name(self, index):
        return f"image {index}"


@dataclasses.dataclass(kw_only=True)
class Few:
    """Ids below 11."""

    def encode(self, text):
        return [1 + ord(letter) - ord("a") for letter in text]


def recipe(model, path) -> TrainConfig:
    tokenize = Tokenize(tokenizer=Few(), length=5, too_long=TooLong.REFUSE)
    ops = (Decode(), Resize(size_px=24))
    return TrainConfig(
        num_steps=1,
        model=model,
        objective=SigLIP(),
        data=Stream(source=Captioned(), ops=(*ops, tokenize), batch_size=8),
        preprocess=ops,
        optimizer=SGD(schedule=Constant(peak=1e-3), momentum=0.0),
        init=(Init(path=str(path)),),
    )


@pytest.mark.slow
def test_a_whole_siglip_goes_on_training_and_comes_back(tmp_path, capsys):
    case = both_sides.THEIRS["HF SigLIP, both"]
    theirs = both_sides.randomise(case.build(), seed=1)
    theirs.save_pretrained(tmp_path / "theirs")
    model = foreign.load(str(tmp_path / "theirs")).model
    workdir = epath.Path(tmp_path / "run")
    config = recipe(model, tmp_path / "theirs")
    state = jax.device_get(train.train(config, workdir))
    shown = " ".join(capsys.readouterr().out.split())
    assert "from scratch" not in shown and "differ" not in shown
    moved = state.params["text_tower"]["embedding"]["tokens"]
    first = foreign.load(str(tmp_path / "theirs")).variables
    change = np.abs(moved - first["text_tower/embedding/tokens"]).max()
    assert 0 < change < 0.1
    # Their images alone, ours alone, and both towers.
    images = shapes_run.shared()[0] / "val"
    words = [f"--images={images}", f"--embed={tmp_path / 'x.npz'}"]
    words = ["predict", f"--workdir={tmp_path / 'theirs'}", *words]
    assert command_line.run(predict.main, words) == 0
    out = tmp_path / "whole"
    words = ["convert", str(workdir), "--to=huggingface", f"--out={out}"]
    words += [f"--allow_module={__name__}"]
    convert_checkpoint.main([*words, "--whole"])
    assert "texts" in (out / "parity.txt").read_text()
    back = transformers.SiglipModel.from_pretrained(out).eval()
    variables = {
        name: np.asarray(x) for name, x in foreign.load(str(out)).variables.items()
    }
    compare(model, variables, back, (24, 24))
    np.testing.assert_array_equal(variables["text_tower/embedding/tokens"], moved)
    shutil.rmtree(out)
    convert_checkpoint.main(words)
    assert "its image_tower alone; --whole" in capsys.readouterr().out
    transformers.SiglipVisionModel.from_pretrained(out)


def test_the_image_tower_of_a_whole_siglip_is_what_is_fine_tuned(tmp_path):
    theirs = both_sides.randomise(both_sides.THEIRS["HF SigLIP, both"].build(), seed=1)
    theirs.save_pretrained(tmp_path / "theirs")
    place = load.locate(str(tmp_path / "theirs"))
    assert isinstance(place.pretrained().model, ViT)
    loaded = place.weights(log=lambda line: None)
    assert loaded.part == "image_tower" and isinstance(loaded.backbone, ViT)


def test_other_towers_have_no_counterpart_and_say_why(tmp_path):
    from big_vision_lite.conversion import export
    from big_vision_lite.conversion.formats import Library

    for model, message in (
        (towers(bias=None), "has a bias, this model bias=none"),
        (towers(project_image=True), "project_image=True. Without --whole"),
        (
            towers(features=8),
            "image tower gives, this model features=8",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            export.find(model, Library.HUGGINGFACE, (16, 16))
