"""Models of other libraries here and ours there: the same numbers, and back again."""

import dataclasses
import re

import numpy as np
import pytest
import torch_libraries
from big_vision_bit import random_variables
from conversion_cases import FEW_OURS, FEW_THEIRS, OURS, THEIRS
from conversion_cases.case import EVEN, Ours
from foreign_models import relative_difference
from tiers import SLOW, few

pytestmark = pytest.mark.parity

pytest.importorskip("torch")
torch_libraries.import_torchvision()
for library in ("timm", "torchvision", "transformers"):
    pytest.importorskip(library)
import both_sides  # noqa: E402
import parity  # noqa: E402
from both_sides import BOUND  # noqa: E402

from big_vision_lite.conversion import files, foreign, formats, preprocessing  # noqa: E402
from big_vision_lite.conversion.families import FORMATS  # noqa: E402
from big_vision_lite.conversion.formats import Architecture, Library  # noqa: E402
from big_vision_lite.conversion.weights import Weights  # noqa: E402
from big_vision_lite.training import state as state_lib  # noqa: E402
from big_vision_lite.types import backbone_of  # noqa: E402

PLACES = [
    pytest.param(
        case,
        size,
        id="{}-{}x{}".format(case, *size),
        marks=() if case in FEW_THEIRS and size == made.sizes[0] else SLOW,
    )
    for case, made in THEIRS.items()
    for size in made.sizes
]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_every_format_of_torch_has_a_case_by_default():
    torchs = {f.name for f in FORMATS if f.library in list(Library)[:3]}
    covered = {THEIRS[case].form for case in FEW_THEIRS}
    # Two libraries share its names: a file that says nothing is torchvision's.
    assert torchs - covered == set()


@pytest.mark.parametrize(("case", "size"), PLACES)
def test_theirs_give_the_same_numbers_here(case, size, tmp_path):
    found = both_sides.imported(case, tmp_path, size)
    channels = found.architecture.channels
    model, variables = found.model, found.variables
    difference = both_sides.worst(model, variables, found.theirs, size, channels)
    print(f"{found.form.name}: {case}, {size}: {difference:.1e}")
    assert difference <= BOUND
    assert found.form.name == THEIRS[case].form
    stride = 8 if "hybrid" in case else 1
    whole = tuple(-(-side // stride) * stride for side in size)
    assert found.architecture.image_size_px in (whole, None)
    if THEIRS[case].goes_by_name:
        assert not found.architecture.assumptions


MODULES = [case for case, made in THEIRS.items() if made.config is not None]


@pytest.mark.parametrize("case", few(MODULES, *FEW_THEIRS))
def test_ours_fill_a_module_of_theirs_and_come_back_bit_for_bit(case, tmp_path):
    """Also what no name of a library builds, so that it has no folder."""
    found = both_sides.imported(case, tmp_path)
    made, model, channels = THEIRS[case], found.model, found.architecture.channels
    size = made.sizes[0]
    # Others than came in: nothing can be left over from there.
    ours = random_variables(model, size, channels, seed=3)
    form = next(f for f in FORMATS if f.name == made.form)
    arrays = formats.write(form, model, size, ours)
    writes_all = arrays.keys() == found.theirs.state_dict().keys()
    if not made.goes_by_name or writes_all:
        theirs = both_sides.load_strictly(made.build(), _fitting(arrays, made.build()))
        assert both_sides.worst(model, ours, theirs, size, channels) <= BOUND
    back = Weights(arrays=arrays, path="back", config=made.config)
    again = both_sides.read(back, size)
    assert again.model == model
    assert_same(again.variables, ours)


def _fitting(arrays, module):
    """Puts zeros before positions whose first rows are those of tokens."""
    shapes = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    table = arrays.get("pos_embed")
    if table is None or shapes["pos_embed"] == table.shape:
        return arrays
    rows = shapes["pos_embed"][1] - table.shape[1]
    zeros = np.zeros((1, rows, table.shape[2]), np.float32)
    return {**arrays, "pos_embed": np.concatenate([zeros, table], axis=1)}


@pytest.mark.parametrize("case", few(OURS, *FEW_OURS))
def test_ours_go_there_as_a_folder_and_come_back_bit_for_bit(case, tmp_path):
    ours = OURS[case]
    variables = random_variables(ours.model, ours.size, ours.channels, seed=5)
    exported, theirs = both_sides.put(ours, variables, tmp_path / "out")
    given = (ours.size, ours.channels)
    difference = both_sides.worst(ours.model, variables, theirs, *given)
    print(f"{exported.form.name}: {case}: {difference:.1e}")
    assert difference <= BOUND
    if case == "timm ViT, flexivit":
        return  # it leaves as a plain one
    if not ours.returns:
        architecture = Architecture(model=ours.model, channels=ours.channels)
        written = files.read(str(tmp_path / "out"))
        assert exported.form.architecture(written).channels == ours.channels
        back = formats.load(written, exported.form, architecture, ours.size)
        assert_same(back, variables)
        return
    found = foreign.load(str(tmp_path / "out"))
    assert found.model == scaled_like(ours.model, found.model)
    assert (found.image_size_px, found.channels) == (ours.size, ours.channels)
    assert found.format == exported.form.name
    assert_same(found.variables, variables)


def scaled_like(model, other):
    """Returns the model with the scaling of pixels of another."""
    backbone = backbone_of(other)[1]
    return foreign.scaled(model, backbone.mean, backbone.std)


NAMED = [case for case, made in THEIRS.items() if made.goes_by_name]


@pytest.mark.parametrize(
    "case", few(NAMED, *(c for c in FEW_THEIRS if "attention" not in c))
)
def test_what_came_from_a_library_goes_back_by_the_name_it_is_given(case, tmp_path):
    found = both_sides.imported(case, tmp_path / "in")
    library = next(f.library for f in FORMATS if f.name == THEIRS[case].form)
    size, channels = THEIRS[case].sizes[0], found.architecture.channels
    ours = Ours(library=library, model=found.model, size=size, channels=channels)
    exported, theirs = both_sides.put(ours, found.variables, tmp_path / "out")
    difference = both_sides.worst(found.model, found.variables, theirs, size, channels)
    assert difference <= BOUND
    back = foreign.load(str(tmp_path / "out"))
    assert back.model == scaled_like(found.model, back.model)
    assert_same(back.variables, found.variables)
    if library == Library.TORCHVISION:
        report = parity.compare(
            back.model,
            {"params": state_lib.split_variables(found.variables)[0]},
            preprocessing.from_torchvision(size),
            channels,
            exported,
            tmp_path / "out",
        )
        assert report.passed and report.pixels <= 1
        assert "encoder/block_01" in report.text()


@pytest.mark.parametrize("case", ["timm ResNet, groups", "HF ResNet, bottleneck"])
def test_every_unit_has_the_same_output_on_both_sides(case, tmp_path):
    found = both_sides.imported(case, tmp_path, EVEN)
    model, variables = found.model, found.variables
    params, collections = state_lib.split_variables(variables)
    leaves = {name: array.shape for name, array in variables.items()}
    pairs = parity.paired_modules(found.form.entries(model, EVEN, leaves))
    outputs, ours = parity.run_ours(
        model,
        {"params": params, **collections},
        both_sides.pixels(EVEN),
        [pair[0] for pair in pairs],
    )
    _, theirs = parity.run_theirs(
        found.theirs, outputs["image"], [pair[1] for pair in pairs]
    )
    compared = [pair for pair in pairs if pair[0] in ours and pair[1] in theirs]
    compared_ours = [mine for mine, _ in compared]
    units = [m for m in compared_ours if re.fullmatch(r"stage_\d+/unit_\d+", m)]
    norms = [m for m in compared_ours if "norm" in m.rpartition("/")[2]]
    # A stage of one unit is paired as a stage, which is no module of ours.
    assert len(units) == sum(n for n in model.stages if n > 1)
    assert len(norms) >= 2 * sum(model.stages)
    for mine, other in compared:
        moved = np.moveaxis(theirs[other], 1, -1)
        assert relative_difference(ours[mine], moved) <= BOUND, mine


def test_the_harness_sees_a_swap_of_two_arrays(tmp_path):
    found = both_sides.imported("timm ResNet, groups", tmp_path, EVEN)
    names = [f"stage_1/unit_01/norm{index}/scale" for index in (1, 2)]
    first, second = (found.variables[name] for name in names)
    swapped = {**found.variables, names[0]: second, names[1]: first}
    assert both_sides.worst(found.model, swapped, found.theirs) > 100 * BOUND
    assert dataclasses.is_dataclass(found)
