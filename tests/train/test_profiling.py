"""Profiles of some steps: which steps they hold, that a run is the same with them, and where they lie."""

from __future__ import annotations

import gzip
import json
import re

import pytest
from runs import notes_of, run_of, stop_after, tiny, train, weights_of

from densenet_dist.cluster.launch import fit as launch
from densenet_dist.errors import ConfigError


def profiles(config) -> dict[str, list[int]]:
    """The steps in each trace, by its name."""
    found = {}
    for path in sorted((run_of(config).path / "profile").glob("*.json.gz")):
        with gzip.open(path, "rt") as file:
            events = json.load(file)["traceEvents"]
        assert any(event.get("name") == "aten::convolution_backward" for event in events)
        steps = (re.fullmatch(r"step (\d+)", event.get("name", "")) for event in events)
        found[path.name.removesuffix(".trace.json.gz")] = sorted({int(step[1]) for step in steps if step})
    return found


def test_a_profile_has_its_steps_changes_nothing_and_goes_on_in_a_resumed_run(tmp_path):
    settings = ("train.epochs=3", "model.drop_rate=0.1")
    plain, config = tiny(tmp_path / "plain", *settings), tiny(tmp_path, *settings, "train.profile=[3, 12]")
    train(plain)
    stop_after(1, config)
    assert profiles(config) == {"steps-3-5": [3, 4]}
    notes = notes_of(config)
    # A part ends with its epoch.
    assert profiles(config) == {"steps-3-5": [3, 4], "steps-5-10": [5, 6, 7, 8, 9], "steps-10-12": [10, 11]}
    assert weights_of(plain) == weights_of(config)
    table = (run_of(config).path / "profile" / "steps-3-5.txt").read_text()
    assert table.startswith("2 steps on cpu")
    assert any(f"{run_of(config).uri}/profile/steps-5-10.trace.json.gz" in note for note in notes)


def test_steps_that_never_come_and_what_is_no_range_of_up_to_100_steps_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.profile: starts after step 15, .* has 15"):
        launch(tiny(tmp_path, "train.profile=[15, 17]"), listener=lambda event: None)
    assert not (run_of(tiny(tmp_path)).path / "metrics.jsonl").exists()
    for steps in ("[5, 5]", "[0, 101]", "5"):
        with pytest.raises(ConfigError, match=r"train\.profile"):
            tiny(tmp_path, f"train.profile={steps}")
