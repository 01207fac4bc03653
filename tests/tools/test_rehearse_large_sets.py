"""Sets of many records, made and read as tools/rehearse_large_sets.py does at size."""

import argparse

import pytest
import rehearse_large_sets as rehearsal

from big_vision_lite.data.sources.tfds import prepared_set


@pytest.mark.slow
@pytest.mark.tools
@pytest.mark.parametrize(
    "kind, records, kept",
    [
        ("tfrecord", 100_003, 100_003),
        ("array_record", 100_003, 100_003),
        ("folder", 20_000, 18_000),  # a tenth of each class is held out
    ],
)
def test_one_process_and_two_hosts_read_what_was_written(
    kind, records, kept, tmp_path, monkeypatch
):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    rehearsal.make(kind, tmp_path, records, shards=64)
    source = rehearsal.open_source(kind, str(tmp_path))
    assert len(source) == kept
    if kind != "folder":
        shards = (
            prepared_set.load(tmp_path / kind / "rehearsal" / "1.0.0")
            .splits["train"]
            .shards
        )
        assert len(shards) == 64 and sum(count for _, count in shards) == records
    # Labels and rows of every batch are compared on the way; a wrong one raises.
    options = argparse.Namespace(
        kind=kind, out=str(tmp_path), records=records, shards=64
    )
    costs = {cost.what: cost for cost in rehearsal.measurements(options)}
    assert len(costs) == 7 and "batch of step 1,000,000" in costs
    read = costs["a record of every file"].open_files - costs["open"].open_files
    # Two threads may have read of one file at once.
    assert read == 0 if kind == "folder" else 64 <= read <= 128
