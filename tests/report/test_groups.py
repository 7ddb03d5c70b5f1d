"""Means and intervals over seeds."""

from __future__ import annotations

import json

import pytest
from runs import tiny

from densenet_dist.config import to_yaml
from densenet_dist.errors import ConfigError
from densenet_dist.report.comparison import differences, group
from densenet_dist.report.record import read_run
from densenet_dist.run_folder import RunFolder


@pytest.fixture
def made(tmp_path):
    """A run's record, of a folder with nothing but settings and one epoch."""

    def make(name, *settings, top1=0.5):
        folder = RunFolder(str(tmp_path), name)
        folder.create()
        folder.write("config.yaml", to_yaml(tiny(tmp_path, *settings)))
        lines = [
            {"epoch": 1, "global_step": 5, "train/loss": 2.0, "train/top1": 0.3, "train/top5": 0.8, "seconds": 1.0},
            {"epoch": 1, "global_step": 5, "test/loss": 1.5, "test/top1": top1, "test/top5": 0.9},
        ]
        folder.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        return read_run(tmp_path / name)

    return make


def test_runs_that_differ_in_their_seed_are_one_group(made):
    members = [
        made("a", "seed=0", top1=0.50),
        made("b", "train.lr=0.1", top1=0.9),
        made("c", "seed=1", "data.root=elsewhere", "cluster.timeout_s=5", top1=0.52),
    ]
    for number, setting in enumerate(("cluster.workers=1", "cluster.cpus_per_worker=1", "checkpoint.monitor=val/loss")):
        assert len(group([members[0], made(f"other{number}", "seed=1", setting)])) == 2, setting
    groups = group(members)
    assert [[member.name for member in found.members] for found in groups] == [["a", "c"], ["b"]]
    assert [found.label for found in groups] == ["train.lr=0.05", "train.lr=0.1"]
    assert differences(groups) == {"train.lr": [0.05, 0.1]}
    top1 = groups[0].interval(lambda member: member.test["test/top1"])
    assert top1.mean == pytest.approx(0.51)
    assert top1.half == pytest.approx(12.7062 * 0.01 * 2**0.5 / 2**0.5, rel=1e-4)  # t with one degree of freedom
    assert groups[0].interval(lambda member: None) is None
    (alone,) = group([members[0], members[2]])
    assert (alone.label, differences([alone])) == ("a", {})


def test_runs_of_different_data_sets_are_refused(made):
    with pytest.raises(ConfigError, match=r"cannot be compared:\n  shapes: a, c\n  cifar10: b"):
        group([made("a"), made("b", "data.name=cifar10"), made("c")])
