"""Every recipe builds, is what it was when it was last looked at, and takes two steps.

After a wanted change: UPDATE_GOLDEN=1 pytest tests/test_recipes.py, and look at the
difference.
"""

import ast
import enum
import itertools
import os
import pathlib
import re
import shlex

import cv2
import jax
import numpy as np
import pytest
from etils import epath
from prepared import prepare

from big_vision_lite import train
from big_vision_lite.data import sources
from big_vision_lite.data.sources import arrays, vocabulary
from big_vision_lite.data.sources.tfds import prepared_set
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.recipes import command_line, mistakes, serialize
from big_vision_lite.runs.records import read_history

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = pathlib.Path(__file__).parent / "golden"
ARGUMENTS = {
    "quickstart": ("",),
    "fashion_mnist": ("", "epochs=10"),
    "glyphs": ("", "model=vit", "model=vit_token", "fashion=true"),
    "vit_s16_i1k": ("", "fewshot=true"),
    "bit_i1k": ("",),
    "masked_fashion": ("", "transfer=false", "method=capi"),
    "comparison": ("", *(f"method={m}" for m in ("mae", "capi", "ibot", "siglip"))),
    "mae_i1k": ("", "pixio=true"),
    "dino_i1k": ("", "blur=as_published"),
    "lejepa_imagenette": ("",),
    "glyphs_views": ("", *(f"method={m}" for m in ("dino", "vicreg", "lejepa"))),
    "glyphs_distil": ("",),
    "glyphs_tags": ("", "objective=sigmoid,resample=square_root,noise=0.1"),
    "glyphs_captions": ("", "loss=clip"),
    "siglip": ("", "tokenizer=c4_en"),
    "cappa": ("", "probe=true"),
}
CASES = [(name, arg) for name, args in ARGUMENTS.items() for arg in args]


def parse(name: str, arg: str, *overrides: str):
    recipe = f"{ROOT}/configs/{name}.py" + (f":{arg}" if arg else "")
    command = ["train", f"--config={recipe}", *overrides]
    return command_line.parse(command, train.define_flags).config


def without_version(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if '"version"' not in line)


@pytest.mark.parametrize("name, arg", CASES)
def test_a_recipe_resolves_to_what_is_checked_in(name, arg):
    resolved = without_version(serialize.to_json(parse(name, arg))) + "\n"
    golden = GOLDEN / (f"{name}_{arg.replace('=', '_')}" if arg else name)
    golden = golden.with_suffix(".json")
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(resolved)
    assert resolved == golden.read_text(), f"look at the change, then update {golden}"


NATIVE = {
    **{"quickstart": 8, "fashion_mnist": 28, "masked_fashion": 28},
    **dict.fromkeys(("glyphs", "glyphs_views", "glyphs_distil", "comparison"), 32),
    **{"glyphs_tags": 32, "glyphs_captions": 32},
}


def preprocessed(config, pixels):
    example = {"image": cv2.imencode(".png", pixels)[1].tobytes()}
    for op in config.preprocess:
        example = op(example, np.random.default_rng(0))
    return example["image"]


@pytest.mark.parametrize("name, arg", CASES)
def test_whatever_size_an_image_has_the_model_gets_its_own(name, arg):
    config, rng = parse(name, arg), np.random.default_rng(0)
    sizes = ((300, 280), (40, 64), (5, 7))
    pixels = [rng.integers(0, 256, size, np.uint8) for size in sizes]
    shapes = {preprocessed(config, image).shape for image in pixels}
    assert len(shapes) == 1
    if (side := NATIVE.get(name)) is not None:
        assert shapes == {(side, side, 1)}
        # What has this size already passes bit for bit, so that scores are what
        # they would be without resizing.
        image = rng.integers(0, 256, (side, side), np.uint8)
        np.testing.assert_array_equal(preprocessed(config, image)[..., 0], image)
        # Smaller by averaging: a fine pattern becomes gray, not black or white.
        checkered = np.indices((8 * side, 8 * side)).sum(0) % 2 * 255
        gray = preprocessed(config, checkered.astype(np.uint8))
        assert abs(gray.astype(int) - 127).max() <= 1


# Of the sets that recipes name; what is tested is which examples a slice means.
SIZES = {
    "imagenet2012": {"train": 1_281_167, "validation": 50_000},
    "imagenette/160px-v2": {"train": 9_469, "validation": 3_925},
    "fashion_mnist": {"train": 60_000, "test": 10_000},
    "coco_captions": {"train": 82_783, "val": 5_000, "test": 5_000},
    "glyphs32_latin": {"train": 1009, "validation": 101, "test": 103},
    "glyphs32_tags": {"train": 1009, "validation": 101, "test": 103},
}


def examples_of(source) -> list[tuple[str, int, int]]:
    """Returns (split, first, end) of every range of examples in a source."""
    if isinstance(source, sources.Digits):
        rows = arrays.DIGITS_SPLITS[source.split]
        return [("digits", rows.start, rows.stop)]
    if isinstance(source, sources.Resampled | sources.Tags):
        return examples_of(source.source)
    splits = {
        name: prepared_set.Split(name=name, shards=((ROOT, count),), num_bytes=0)
        for name, count in SIZES[source.dataset].items()
    }
    prepared = prepared_set.PreparedSet(
        folder=ROOT, version="", file_format="array_record", splits=splits, features={}
    )
    return [(r.split, r.start, r.stop) for r in prepared.ranges(source.split)]


@pytest.mark.parametrize("name, arg", CASES)
def test_no_example_is_in_two_of_training_choice_and_score(name, arg):
    config = parse(name, arg)
    parts = {"training": config.data.source} | {
        name: evaluator.source
        for name, evaluator in config.evaluators.items()
        if isinstance(evaluator, Classification)
    }
    ranges = [r for source in parts.values() for r in examples_of(source)]
    for (split, _, end), (other, start, _) in itertools.pairwise(sorted(ranges)):
        assert split != other or end <= start
    if name in ("vit_s16_i1k", "bit_i1k"):
        # Settings are chosen on a hundredth of the training images, which together
        # with the others are all; the published validation images score once.
        assert parts.keys() == {"training", "minival", "val"}
        assert examples_of(parts["training"]) == [("train", 0, 1_268_355)]
        assert examples_of(parts["minival"]) == [("train", 1_268_355, 1_281_167)]
        assert examples_of(parts["val"]) == [("validation", 0, 50_000)]


@pytest.mark.parametrize("name, arg", CASES)
def test_a_recipe_survives_json_and_back(name, arg):
    config = parse(name, arg)
    text = serialize.to_json(config)
    assert serialize.to_json(serialize.from_json(text)) == text


@pytest.mark.parametrize("name, arg", CASES)
def test_every_leaf_of_a_recipe_can_be_overridden(name, arg):
    """Overriding each leaf by its own value gives the same recipe."""
    config = parse(name, arg)
    overrides = [
        f"--config.{path}={text}"
        for path, value, _ in mistakes.list_leaves(config)
        if (text := as_flag(value)) is not None
    ]
    assert len(overrides) > 30
    assert serialize.to_json(parse(name, arg, *overrides)) == serialize.to_json(config)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_override_changes_its_leaf_and_no_other(name):
    """Or is refused with its name, where the value does not fit the others."""
    before = {path: value for path, value, _ in mistakes.list_leaves(parse(name, ""))}
    changed, refused = 0, []
    for path, value in before.items():
        if (other := another(value)) is None:
            continue
        try:
            config = parse(name, "", f"--config.{path}={as_flag(other)}")
        except ValueError as error:
            assert path.rpartition(".")[2].partition("[")[0] in str(error)
            refused.append(path)
            continue
        after = {path: value for path, value, _ in mistakes.list_leaves(config)}
        assert {p for p in before if after[p] != before[p]} == {path}
        assert after[path] == other and after.keys() == before.keys()
        changed += 1
    assert changed > 20 and len(refused) < changed / 5, refused


def another(value):
    """Returns another value of the same type, None where there is no telling."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, enum.StrEnum):
        return next(other for other in type(value) if other != value)
    if isinstance(value, int):
        return 2 * abs(value) + 1
    if isinstance(value, float):
        return value / 2 if value else 0.25
    return None


def as_flag(value) -> str | None:
    """Writes a value as a user would type it; None where there is nothing to type."""
    if isinstance(value, dict) or value == ():
        return None
    return "none" if value is None else str(value)


WITH_DATA_DIR = (
    *("fashion_mnist", "glyphs", "vit_s16_i1k", "bit_i1k"),
    *("masked_fashion", "mae_i1k", "glyphs_views", "glyphs_distil", "comparison"),
    *("dino_i1k", "lejepa_imagenette", "glyphs_tags"),
    *("glyphs_captions", "siglip", "cappa"),
)


def commands(text: str, start: str) -> list[list[str]]:
    """Splits the commands of a text that begin with `start` as a shell would."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip().startswith(start)]


@pytest.mark.parametrize("name", WITH_DATA_DIR)
def test_the_command_of_a_docstring_names_the_data_of_training_and_evaluation(name):
    docstring = ast.get_docstring(ast.parse((ROOT / f"configs/{name}.py").read_text()))
    (command,) = commands(docstring or "", "python -m big_vision_lite.train")
    flags = [word.replace("DATA_DIR", "/sets") for word in command[2:]]
    check_data_dir(command_line.parse(flags, train.define_flags).config, "/sets")


def test_the_commands_of_the_readme_name_the_data_of_training_and_evaluation():
    rows = [
        line.split("`")[3]
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("|") and "--config configs/" in line and "DATA_DIR" in line
    ]
    assert len(rows) == len(WITH_DATA_DIR)
    for row in rows:
        command = ["train", *shlex.split(row.replace("DATA_DIR", "/sets"))]
        check_data_dir(command_line.parse(command, train.define_flags).config, "/sets")


def test_the_few_shot_sets_of_vit_s16_are_taken_from_data_dir_too():
    config = parse("vit_s16_i1k", "fewshot=true,data_dir=/sets")
    assert check_data_dir(config, "/sets") == 3 + 2 * 6


def check_data_dir(config, folder: str) -> int:
    """Checks that every prepared set lies in `folder`; returns their number."""
    found = re.findall('"data_dir": (.*?),?\n', serialize.to_json(config))
    assert len(found) >= 2 and set(found) == {f'"{folder}"'}
    return len(found)


SMALL_VIT = (
    "--config.model.width=16",
    "--config.model.depth=1",
    "--config.model.num_heads=2",
    "--config.model.mlp_dim=16",
)
# The sets below are too small for the slices of recipes.
PROBE = (
    "--config.evaluators.probe.train.split=train",
    "--config.evaluators.probe.test.split=train",
)
# Tags of the n-th image.
WORDS = (("a", "bold"), ("a",), (), ("b", "bold"), ("a",))
# Recipe, argument, what makes it small, and the set it wants by name.
REDUCED = {
    "quickstart": (
        "",
        ("--config.model.width=8", "--config.evaluators.fewshot.every_steps=0"),
        None,
    ),
    "fashion_mnist": ("", SMALL_VIT, ("fashion_mnist", (28, 28, 1), 10)),
    "glyphs": (
        "",
        ("--config.model.width=8", "--config.evaluators.fewshot.every_steps=0"),
        ("glyphs32_latin", (32, 32, 1), 62),
    ),
    **{
        f"glyphs, {model}": (
            f"model={model}",
            ("--config.model.width=24", "--config.evaluators.fewshot.every_steps=0"),
            ("glyphs32_latin", (32, 32, 1), 62),
        )
        for model in ("vit", "vit_token")
    },
    "vit_s16_i1k": ("size=32", SMALL_VIT, ("imagenet2012", (40, 48, 3), 1000)),
    "bit_i1k": (
        "",
        ("--config.model.stages=(1,)", "--config.model.width=32"),
        ("imagenet2012", (40, 48, 3), 1000),
    ),
    "masked_fashion": (
        "transfer=false,steps=8",
        (
            "--config.model.encoder.width=16",
            "--config.model.encoder.depth=1",
            "--config.evaluators.loss.source.split=train",
            "--config.evaluators.pictures.source.split=test",
            *PROBE,
        ),
        ("fashion_mnist", (28, 28, 1), 10),
    ),
    **{
        f"glyphs_views, {method}": (
            f"method={method}",
            (
                "--config.model.encoder.width=8",
                "--config.model.projector.features=8",
                "--config.evaluators.fewshot.every_steps=0",
                *PROBE,
            ),
            ("glyphs32_latin", (32, 32, 1), 62),
        )
        for method in ("ntxent", "dino", "vicreg", "lejepa")
    },
    **{
        f"comparison, {method}": (
            f"method={method},transfer=false",
            ("--config.model.encoder.width=24", "--config.model.encoder.depth=1"),
            ("glyphs32_latin", (32, 32, 1), 62),
        )
        for method in ("capi", "ibot")
    },
    "dino_i1k": (
        "size=Ti/16",
        (
            "--config.model.encoder.depth=1",
            "--config.model.prototypes=64",
            "--config.model.patch_prototypes=64",
            *PROBE,
        ),
        ("imagenet2012", (40, 48, 3), 1000),
    ),
    "lejepa_imagenette": (
        "",
        ("--config.model.encoder.width=48", "--config.model.encoder.depth=1"),
        ("imagenette/160px-v2", (40, 48, 3), 10),
    ),
    "glyphs_distil": (
        "images=64",
        ("--config.model.width=8",),
        ("glyphs32_latin", (32, 32, 1), 62),
    ),
    "glyphs_tags": (
        "resample=square_root,noise=0.2,classes=3",
        ("--config.model.width=8", "--config.evaluators.fewshot.every_steps=0"),
        ("glyphs32_tags", (32, 32, 1), 62),
    ),
    **{
        f"glyphs_captions, {loss}": (
            f"loss={loss}",
            (
                "--config.model.image_tower.width=8",
                "--config.model.text_tower.depth=1",
                "--config.evaluators.fewshot.every_steps=0",
                "--config.evaluators.new_fonts.source.split=test",
            ),
            ("glyphs32_latin", (32, 32, 1), 62, {"font": ["a-Bold.ttf", "b.ttf"]}),
        )
        for loss in ("siglip", "clip")
    },
    "siglip": (
        "size=Ti/16,image_px=32",
        (
            "--config.model.image_tower.depth=1",
            "--config.model.text_tower.depth=1",
            "--config.evaluators.retrieval.captions=2",
        ),
        ("coco_captions", (40, 48, 3), 2, {"captions/text": [("a cat", "cats"), "a"]}),
    ),
    "cappa": (
        "size=Ti/16,image_px=32",
        ("--config.model.encoder.depth=1", "--config.model.decoder_depth=1"),
        ("coco_captions", (40, 48, 3), 2, {"captions/text": [("a cat", "cats"), "a"]}),
    ),
    "mae_i1k": (
        "size=Ti/16",
        (
            "--config.model.decoder_depth=1",
            "--config.model.encoder.depth=1",
            "--config.evaluators.pictures.source.split=validation",
            *PROBE,
        ),
        ("imagenet2012", (40, 48, 3), 1000),
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        # Others compile for long and have its parts; test_quickstart.py trains one.
        pytest.param(name, marks=pytest.mark.slow) if name != "vit_s16_i1k" else name
        for name in REDUCED
    ],
)
def test_a_recipe_takes_two_steps_at_reduced_size(name, tmp_path, monkeypatch):
    """On eight devices, the batch over all of them, parameters split over four."""
    arg, smaller, wanted = REDUCED[name]
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    if wanted is not None:
        dataset, shape, num_classes, *texts = wanted
        splits = dict.fromkeys(("train", "validation", "val", "test"), 100)
        words = WORDS if dataset.endswith("_tags") else ()
        prepare(
            tmp_path,
            dataset,
            shape=shape,
            num_classes=num_classes,
            splits=splits,
            words=words,
            texts=texts[0] if texts else {},
        )
        # Where recipes look for it without data_dir.
        monkeypatch.chdir(tmp_path)
        if words:
            text = vocabulary.build(words).text()
            (tmp_path / f"{dataset}.json").write_text(text)
    steps = ("--config.num_steps=2", "--config.data.batch_size=8")
    config = parse(
        name.partition(",")[0], arg, *smaller, *steps, "--config.mesh.fsdp=4"
    )
    for field in ("warmup_steps", "drop_fractions"):
        if hasattr(config.optimizer.schedule, field):
            zero = type(getattr(config.optimizer.schedule, field))()
            setattr(config.optimizer.schedule, field, zero)
    for evaluator in config.evaluators.values():
        evaluator.batch_size = 8
    workdir = epath.Path(tmp_path / "run")
    state = train.train(config, workdir, quiet=True)
    assert int(state.step) == 2
    leaves = jax.tree.leaves(state.params)
    split = sum(leaf.size for leaf in leaves if not leaf.sharding.is_fully_replicated)
    assert split > 0.5 * sum(leaf.size for leaf in leaves)
    assert {len(leaf.sharding.device_set) for leaf in leaves} == {8}
    records = read_history(workdir)
    assert {name for r in records for name in r} >= {
        "train/loss",
        *(
            f"{name}/accuracy"
            for name, evaluator in config.evaluators.items()
            if isinstance(evaluator, Classification)
        ),
    }


def test_every_recipe_is_listed_here_or_tested_with_its_own_data():
    there = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert there - set(ARGUMENTS) <= {
        *("finetune", "folder", "table", "distil", "distil_i1k", "weak_tags"),
    }
