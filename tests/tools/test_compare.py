"""The comparison's table: means over seeds, controls, and what is still to do."""

import dataclasses
import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tools"))
import compare  # noqa: E402


def result(method: str, seed: int, digits: float, **fields) -> compare.Result:
    scores = dict.fromkeys((*compare.COLUMNS, compare.FINE_TUNED), 50.0)
    known = dict(
        method=method,
        seed=seed,
        steps=1500,
        cpu_seconds=200.0 + seed,
        scores=scores | {"digits": digits},
        controls={},
        commit="abc",
        date="2026-01-02",
        machine="a machine",
    )
    return compare.Result(**known | fields)


def test_the_table_has_means_and_deviations_and_the_best_first():
    controls = {"raw pixels": {"digits": 83.6}, "untrained": {"digits": 60.0}}
    results = [
        result("mae", 0, 70.0),
        result("mae", 1, 74.0),
        result("vicreg", 0, 90.0, controls=controls),
    ]
    lines = compare.table(results).splitlines()
    assert lines[2].startswith("| vicreg | 1 | 1,500 | 200 | 90.0 |")
    assert lines[3].startswith("| mae | 2 | 1,500 | 200 ± 1 | 72.0 ± 2.8 | 50.0 ± 0.0")
    assert lines[4] == "| raw pixels | 1 | | | 83.6 |  |  |  |  |"
    assert lines[5].startswith("| untrained | 1 | | | 60.0 |")
    assert "abc" in lines[-1] and "a machine" in lines[-1]


def test_scores_are_found_with_an_average_and_without():
    scores = {}
    for name in compare.COLUMNS.values():
        scores[f"fewshot_ema/{name}/accuracy_l2_chosen"] = 0.5
        scores[f"fewshot_ema/{name}/control_raw_pixels_l2_chosen"] = 0.25
    scores["finetune_ema/accuracy"] = 0.75
    scores["finetune_ema/control_untrained"] = 0.7
    scores["fewshot_ema/digits/10_shot/control_untrained_l2_chosen"] = 0.1
    network, controls = compare.of_evaluation(scores)
    assert network == dict.fromkeys(compare.COLUMNS, 50.0) | {compare.FINE_TUNED: 75.0}
    assert controls["raw pixels"] == dict.fromkeys(compare.COLUMNS, 25.0)
    assert controls["untrained"] == {"digits": 10.0, compare.FINE_TUNED: 70.0}
    plain = {name.replace("_ema/", "/"): value for name, value in scores.items()}
    assert compare.of_evaluation(plain) == (network, controls)


def test_it_goes_on_with_what_is_missing(tmp_path):
    for each in (result("mae", 0, 1.0), result("capi", 1, 1.0)):
        file = tmp_path / f"{each.method}_{each.seed}.json"
        file.write_text(json.dumps(dataclasses.asdict(each)))
    found = compare.missing(("mae", "capi"), 2, compare.read(tmp_path))
    assert found == [(0, "capi"), (1, "mae")]
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json is no result"):
        compare.read(tmp_path)


def test_what_is_missing_or_unknown_is_said(capsys, tmp_path):
    for words, said in (
        ([], "give --data_dir and --runs"),
        (
            ["--data_dir=x", "--runs=y", "--methods=simclr"],
            "the methods are supervised",
        ),
        (["--table", f"--out={tmp_path}"], "has no results yet"),
    ):
        with pytest.raises(SystemExit):
            compare.main(words)
        assert said in capsys.readouterr().err
