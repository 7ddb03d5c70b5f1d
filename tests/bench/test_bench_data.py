"""``densenet-dist bench data``: every loader and batch size is in the table and in the file, with sound figures."""

import json
from pathlib import Path

import pytest

from densenet_dist.cli import main

ROOT = Path(__file__).parents[2]
FAST = ["data.limit=600", "--seconds", "0.1", "--rounds", "2", "--batch-sizes", "64,100"]


def bench(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "data", *arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.slow
def test_table_and_json(tmp_path, capsys):
    out = tmp_path / "loaders.json"
    assert bench(str(ROOT / "configs/quickstart.yaml"), *FAST, "--out", str(out)) == 0
    shown = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert {(row["loader"], row["batch_size"]) for row in found["rows"]} == {
        ("torch", 64), ("torch", 100), ("dali", 64), ("dali", 100), ("reference", None),
    }  # fmt: skip
    for row in found["rows"]:
        assert row["spread"][0] <= row["images_per_s"] <= row["spread"][1]
        assert row["images_per_cpu_s"] > 0
        assert 100 < row["peak_mib"] < 4000
        assert f"{row['images_per_s']:,.0f}" in shown
    rates = {row["loader"]: row["images_per_cpu_s"] for row in found["rows"]}
    assert rates["torch"] > 20 * rates["reference"]
    assert found["rounds"] == 2
    assert found["data"]["name"] == "shapes"
    assert found["environment"]["packages"]["torch"]


@pytest.mark.parametrize("sizes", ["64,,128", "0", "many", "-1"])
def test_batch_sizes_that_are_none(sizes, capsys):
    assert bench(str(ROOT / "configs/quickstart.yaml"), f"--batch-sizes={sizes}") == 2
    assert "write them as 64,128,256" in capsys.readouterr().err


def test_data_that_is_missing_is_said_before_anything_is_measured(tmp_path, capsys):
    arguments = [str(ROOT / "configs/cifar10_small.yaml"), f"data.root={tmp_path}", "data.download=false"]
    assert bench(*arguments) == 4
    assert "cifar-10-batches-bin" in capsys.readouterr().err
