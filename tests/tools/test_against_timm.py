"""The benchmark against timm: both sides make the same steps."""

import importlib.util

import pytest
from benchmark_tool import benchmark, tables

pytestmark = pytest.mark.parity

pytest.importorskip("torch")
if importlib.util.find_spec("timm") is None:  # importing it needs torchvision, too
    pytest.skip("timm is not installed", allow_module_level=True)


@pytest.mark.slow
@pytest.mark.tools
def test_timm_makes_the_same_steps_in_turn(tmp_path):
    written = tmp_path / "table.json"
    shown = benchmark(
        *("--against", "timm", "--model", "ViT:Ti/16,depth=1,width=64,num_heads=2"),
        *("--batch_size", 2, "--image_size", 32, "--steps", 1, "--rounds", 2),
        *("--json", written),
    )
    assert shown.returncode == 0, shown.stderr
    (rows,) = tables(written).values()
    assert {len(values) for name, values in rows.items() if "a step" in name} == {2}
    # timm keeps the fixed positions of 2 x 2 patches as a parameter.
    ours, theirs = rows["parameters, ours"][0], rows["parameters, timm"][0]
    assert theirs - ours == 4 * 64
    for what in ("CPU-seconds", "seconds"):
        here, there = (rows[f"{what} a step, {side}"] for side in ("ours", "timm"))
        expected = [a / b for a, b in zip(here, there, strict=True)]
        assert rows[f"{what}, ours over timm's"] == pytest.approx(expected)
