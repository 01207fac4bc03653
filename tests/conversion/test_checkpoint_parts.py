"""Of a checkpoint one model is taken, and what is left behind is named."""

import argparse

import numpy as np
import pytest
import safetensors.numpy
from foreign_models import gray_resnet

from big_vision_lite.conversion import checkpoint_parts, foreign
from big_vision_lite.conversion import files as weights
from big_vision_lite.conversion.assumption import About

pytestmark = pytest.mark.parity

# The names by which a ViT of timm is known, each array another one.
VIT = {
    name: np.full((2, 2), index, np.float32)
    for index, name in enumerate(
        ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.norm1.weight")
    )
}
AVERAGE = {name: array + 0.5 for name, array in VIT.items()}
BESIDE = np.ones(3, np.float32)


def under(prefix, arrays):
    return {prefix + name: array for name, array in arrays.items()}


def take(arrays, part=""):
    """Returns the arrays of the model, and the one thing that is said or ""."""
    found = checkpoint_parts.take(arrays, "x", {}, part)
    assert len(found.assumptions) < 2
    assert all(each.about == About.PART for each in found.assumptions)
    return found.arrays, "".join(each.words for each in found.assumptions)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    "prefix",
    [
        *("params/", "opt/target/", "state_dict.", "model.", "module.", "net."),
        *("_orig_mod.", "module._orig_mod.", "backbone.", "ema_model.", "encoder."),
        *("module.base_encoder.", "teacher.backbone.", "student.module.backbone."),
        *("state_dict.model.backbone.", "model.online_network.encoder.net."),
    ],
)
def test_whatever_stands_before_the_names_of_a_model_is_taken_off(prefix):
    found, said = take(under(prefix, VIT))
    assert_same(found, VIT)
    assert not said
    found, said = take({**under(prefix, VIT), "epoch": BESIDE})
    assert_same(found, VIT)
    assert said.startswith(f"took {prefix[:-1]}") and said.endswith("; left: epoch.")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("teacher.backbone.", "student.backbone."),
        ("student.module.", "teacher.module."),
        ("encoder.", "target_encoder."),  # I-JEPA
        ("online_network.", "target_network."),  # BYOL
        ("state_dict_ema.teacher.", "state_dict_ema.student."),
    ],
)
def test_of_two_models_one_is_asked_for(one, other):
    both = {**under(one, VIT), **under(other, AVERAGE)}
    with pytest.raises(ValueError) as caught:
        take(both)
    message = str(caught.value)
    assert f"holds 2 models: {one[:-1]} or {other[:-1]}" in message
    assert f"--config.init.part={one[:-1]} in a recipe" in message
    assert f"--part {one[:-1]}" in message
    for part, expected in ((one[:-1], VIT), (other[:-1], AVERAGE)):
        found, said = take(both, part)
        assert_same(found, expected)
        assert said.startswith(f"took {part}") and "; left: " in said
    # The beginning of a name is enough, where it leads to one.
    if "state_dict_ema" not in one:
        assert_same(take(both, other.split(".")[0])[0], AVERAGE)
    with pytest.raises(ValueError, match="holds 2 models"):
        take(both, "nothing_there")


@pytest.mark.parametrize(
    ("query", "key"),
    [
        ("encoder_q.", "encoder_k."),  # MoCo v1 and v2
        ("module.base_encoder.", "module.momentum_encoder."),  # MoCo v3
    ],
)
def test_of_query_and_key_the_query_is_taken_and_said(query, key):
    both = {**under(query, VIT), **under(key, AVERAGE), "queue": BESIDE}
    found, said = take(both)
    assert_same(found, VIT)
    assert said.startswith(f"took {query[:-1]}, the query encoder; left: ")
    assert "queue" in said and f"--part {key[:-1]} elsewhere" in said
    assert_same(take(both, key[:-1])[0], AVERAGE)


def test_copies_of_the_same_arrays_are_one_model():
    found, said = take({**under("model.", VIT), **under("backbone.", VIT)})
    assert_same(found, VIT)
    assert said == "took model; left: backbone."


def test_moments_of_an_optimizer_are_no_model():
    moments = under("opt_state/0/mu/", AVERAGE) | under("optimizer.exp_avg.", AVERAGE)
    found, said = take({**under("params/", VIT), **moments})
    assert_same(found, VIT)
    assert said == "took params; left: opt_state, optimizer."


@pytest.mark.parametrize(
    ("prefix", "names", "left"),
    [
        ("", ("decoder_embed.weight", "decoder_blocks.0.norm1.weight"), 2),  # MAE
        ("module.", ("projection_head.0.weight", "prototypes.weight"), 2),  # SwAV
        ("encoder_q.", ("fc.0.weight", "fc.2.bias"), 1),  # MoCo v2
        ("base_encoder.", ("head.weight",), 1),
        ("teacher.backbone.", ("head.mlp.0.weight", "head.last_layer.weight_v"), 1),
        ("", ("predictor.0.weight", "projector.2.weight"), 2),
    ],
)
def test_decoders_heads_and_predictors_are_left_behind_and_named(prefix, names, left):
    found, said = take(under(prefix, {**VIT, **dict.fromkeys(names, BESIDE)}))
    assert_same(found, VIT)
    tops = list(dict.fromkeys(prefix + name.split(".")[0] for name in names))
    assert len(tops) == left and sorted(tops) == sorted(
        said.split("left: ")[1].rstrip(".").split(", ")
    )


def test_a_classifier_is_no_projection():
    head = {**VIT, "head.weight": BESIDE}
    assert_same(take(head)[0], head)
    assert_same(take(under("student.", head))[0], head)


def test_a_file_of_no_model_is_refused_by_what_it_holds(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"teacher.foo": BESIDE, "bar": BESIDE}, path)
    with pytest.raises(ValueError, match="names of no model"):
        foreign.load(str(path))
    with pytest.raises(ValueError, match='no model that is known here in "teacher"'):
        foreign.load(str(path), "teacher")


def test_a_whole_resnet_comes_out_of_a_checkpoint_of_moco(tmp_path):
    plain = gray_resnet([0.2, 0.8])
    double = {name: array * 2 for name, array in plain.items()}
    moco = under("encoder_q.", plain) | under("encoder_k.", double) | {"queue": BESIDE}
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(moco, path)
    found = foreign.load(str(path))
    assert found.variables["stem/kernel"].max() == 1 and not found.part
    # Its fc projects for the contrast: there are no classes.
    assert found.model.head is None and found.logits is None
    key = foreign.load(str(path), "encoder_k")
    assert key.variables["stem/kernel"].max() == 2
    assert key.origin["part"] == "encoder_k"
    assert any("encoder_k.fc" in a["words"] for a in key.origin["assumptions"])


# What training scripts of timm and torchvision save.


def tensors(arrays, prefix=""):
    torch = pytest.importorskip("torch")
    return {
        f"{prefix}{name}": torch.from_numpy(array) for name, array in arrays.items()
    }


def adamw():
    """The state that AdamW keeps: more arrays than the model has."""
    torch = pytest.importorskip("torch")
    moments = {"step": torch.ones(()), "exp_avg": torch.ones(2)}
    moments["exp_avg_sq"] = torch.ones(2)
    return {"state": dict.fromkeys(range(3), moments), "param_groups": [{"lr": 0.1}]}


def of_timm():
    return {
        "epoch": 3,
        "arch": "vit_tiny_patch16_224",
        "state_dict": tensors(VIT),
        "optimizer": adamw(),
        "version": 2,
        "args": argparse.Namespace(lr=0.1),
        "state_dict_ema": tensors(AVERAGE),
    }


def of_torchvision():
    torch = pytest.importorskip("torch")
    return {
        "model": tensors(VIT),
        "optimizer": adamw(),
        "args": argparse.Namespace(lr=0.1),
        "model_ema": tensors(AVERAGE, "module.") | {"n_averaged": torch.tensor(9)},
    }


@pytest.mark.parametrize(
    ("make", "taken", "left", "raw"),
    [
        (of_timm, "state_dict_ema", "state_dict, optimizer", "state_dict"),
        (
            of_torchvision,
            "model_ema.module",
            "model, optimizer, model_ema.n_averaged",
            "model",
        ),
    ],
)
def test_of_a_training_checkpoint_the_average_is_taken_and_the_rest_named(
    make, taken, left, raw, tmp_path
):
    torch = pytest.importorskip("torch")
    path = tmp_path / "ä b.pth"
    torch.save(make(), path)
    found = weights.read(str(path))
    assert_same(found.arrays, AVERAGE)
    (line,) = found.assumptions
    said, others = line.words.split(f" For {raw}: ")
    assert said == f"took {taken}, the average; left: {left}."
    assert f"--part {raw} elsewhere" in others
    assert_same(weights.read(str(path), raw).arrays, VIT)


@pytest.mark.parametrize("make", [of_timm, of_torchvision])
def test_without_an_average_the_weights_are_taken_whatever_the_optimizer_keeps(
    make, tmp_path
):
    torch = pytest.importorskip("torch")
    whole = make()
    content = {key: whole[key] for key in whole if not key.endswith("_ema")}
    moments = content["optimizer"]["state"][0]
    content["optimizer"]["state"] = dict.fromkeys(range(50), moments)
    torch.save(content, tmp_path / "x.pth")
    found = weights.read(str(tmp_path / "x.pth"))
    assert_same(found.arrays, VIT)
    (line,) = found.assumptions
    assert line.words.endswith("; left: optimizer.") and "average" not in line.words


def test_a_wrapper_without_the_arrays_of_a_model_is_passed_over(tmp_path):
    torch = pytest.importorskip("torch")
    empty = {"model": tensors(VIT), "model_ema": {"n_averaged": torch.tensor(0)}}
    torch.save(empty, tmp_path / "x.pth")
    found = weights.read(str(tmp_path / "x.pth"))
    assert_same(found.arrays, VIT)
    assert [each.words for each in found.assumptions] == [
        "took model; left: model_ema."
    ]
