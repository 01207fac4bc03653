"""Weights for images of other channels than gray and RGB: arrays come in, no files."""

import json

import big_vision_bit
import cv2
import jax
import numpy as np
import PIL.Image
import pytest
import torch_libraries
from conversion_cases.vit_timm import TINY_OF_TIMM
from etils import epath

import big_vision_lite as bvl
from big_vision_lite import predict
from big_vision_lite.conversion import export, preprocessing
from big_vision_lite.conversion.formats import Library
from big_vision_lite.training import state as state_lib

SIZE = (16, 24)


def written(folder, channels, mean):
    """Writes a timm ViT; returns what was exported and our variables."""
    variables = big_vision_bit.random_variables(TINY_OF_TIMM, SIZE, channels, seed=1)
    cfg = {"mean": mean, "std": [0.5], "crop_pct": 1.0, "crop_mode": "squash"}
    steps = preprocessing.from_timm(cfg, SIZE, channels)
    given = (steps, channels, (), None, Library.TIMM, str(folder))
    exported = export.export(TINY_OF_TIMM, variables, *given)
    export.write(exported, folder)
    return exported, variables


def arrays(channels, count=3, size=SIZE):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, *size, channels), np.uint8)


@pytest.mark.parametrize("channels", [2, 4, 13])
def test_features_of_arrays_are_those_of_the_model(channels, tmp_path):
    mean = np.linspace(0.2, 0.8, channels).tolist()
    _, variables = written(tmp_path / "vit", channels, mean)
    loaded = bvl.load(tmp_path / "vit")
    images = arrays(channels)
    model = TINY_OF_TIMM.clone(mean=tuple(255 * m for m in mean))
    params, _ = state_lib.split_variables(variables)
    expected = jax.jit(model.apply)({"params": params}, images)["pooled"]
    found = loaded.features(images)
    # The same float32 sums, in batches of other sizes.
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    # Every channel is resized as if it were alone: none is transparency.
    (large,) = arrays(channels, count=1, size=(50, 30))
    small = [
        PIL.Image.fromarray(large[..., c]).resize(SIZE[::-1], PIL.Image.BICUBIC)
        for c in range(channels)
    ]
    np.testing.assert_array_equal(
        loaded.features([large]), loaded.features([np.stack(small, axis=-1)])
    )


def test_files_and_arrays_of_other_channels_are_refused_in_a_sentence(tmp_path):
    written(tmp_path / "vit", 4, [0.5])
    loaded = bvl.load(tmp_path / "vit")
    transparent = cv2.imencode(".png", arrays(4)[0])[1].tobytes()
    with pytest.raises(ValueError, match=r"not 4: give arrays, uint8 \[H, W, 4\]"):
        loaded.features([transparent])
    with pytest.raises(ValueError, match=r"an array \[H, W, 4\] .*got \[16, 24, 3\]"):
        loaded.features(arrays(3))
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(transparent)
    command = ["predict", f"--workdir={tmp_path / 'vit'}", f"--images={images}"]
    with pytest.raises(ValueError, match=r"a\.png cannot be read: An image .*not 4"):
        predict.main([*command, f"--embed={tmp_path / 'features.npz'}"])
    assert not epath.Path(tmp_path / "features.npz").exists()


def test_a_mean_for_other_channels_says_where_to_write_another(tmp_path):
    written(tmp_path / "vit", 4, [0.5])
    path = tmp_path / "vit" / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"]["mean"] = list(preprocessing.IMAGENET_MEAN)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="mean has 3 values, its images 4 channels.*"):
        bvl.load(tmp_path / "vit")


@pytest.mark.parity
def test_features_of_four_channels_are_those_of_timm(tmp_path):
    torch = pytest.importorskip("torch")
    torch_libraries.import_torchvision()
    timm = pytest.importorskip("timm")
    import parity

    exported, _ = written(tmp_path / "vit", 4, [0.5])
    images = arrays(4)
    theirs = parity.load(exported, tmp_path / "vit")
    assert isinstance(theirs, timm.models.VisionTransformer)
    scaled = np.moveaxis((np.float32(images) - 127.5) / 127.5, -1, 1).copy()
    with torch.no_grad():
        features = theirs.forward_features(torch.from_numpy(scaled))
        expected = theirs.forward_head(features, pre_logits=True).numpy()
    found = bvl.load(tmp_path / "vit").features(images)
    # float32, two layers.
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parity
def test_they_go_to_timm_without_photographs_to_compare(tmp_path):
    pytest.importorskip("torch")
    torch_libraries.import_torchvision()
    pytest.importorskip("timm")
    import convert_checkpoint

    written(tmp_path / "vit", 4, [0.5])
    flags = [str(tmp_path / "vit"), "--to=timm", f"--out={tmp_path / 'out'}"]
    convert_checkpoint.main(["convert_checkpoint.py", *flags])
    text = (tmp_path / "out" / "parity.txt").read_text()
    assert "logits on random pixels" in text and "photographs:" not in text
    assert "preprocessing not compared: no photograph has such channels" in text
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [4, *SIZE]
    assert config["model_args"]["in_chans"] == 4
