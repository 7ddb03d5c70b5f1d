"""Faults against real commands. A few cases here, all of them in the nightly run and on docs/reliability.md."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from densenet_dist.chaos.case import CASES, Case, in_order
from densenet_dist.chaos.lab import Lab, Observed, Skipped, Unexpected, require_same
from densenet_dist.chaos.page import page_of
from densenet_dist.chaos.running import choose, merged, run_cases
from densenet_dist.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
QUICK = ("process-killed-plateau", "weights-flipped", "second-job")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.nightly) for name in CASES]
)
def test_as_expected(lab, name):
    try:
        assert CASES[name].run(lab).text
    except Skipped as reason:
        pytest.skip(str(reason))
    finally:
        lab.close()


def test_the_page_has_every_case_and_all_are_as_expected():
    page = PAGE.read_text()
    rows = [line for line in page.splitlines() if line.endswith("| as expected |")]
    assert len(CASES) >= 40
    assert len(rows) == len(CASES)
    for case in CASES.values():
        assert f"| {case.fault.replace('<', '&lt;')} | {case.expected} |" in page, case.name


# That it can tell right from wrong


def run(folder: Path, weights: bytes = b"w", loss: float = 0.5) -> Path:
    """What `require_same` looks at, of a run without TensorBoard."""
    checkpoint = folder / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(weights)
    (folder / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "train/loss": loss, "seconds": id(folder)}) + "\n")
    (folder / "tb").mkdir()
    return folder


def test_equal_runs_are_the_same(tmp_path):
    require_same(run(tmp_path / "a"), run(tmp_path / "b"))


@pytest.mark.parametrize(("changes", "named"), [({"weights": b"v"}, "weights"), ({"loss": 0.5000001}, "metrics.jsonl")])
def test_a_difference_is_named(tmp_path, changes, named):
    with pytest.raises(Unexpected, match=f"{named} of b differ"):
        require_same(run(tmp_path / "b", **changes), run(tmp_path / "a"))


def case_of(outcome: Observed | Exception) -> Case:
    def experiment(lab: Lab) -> Observed:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return Case("some", "Soak", "a <fault>", "nothing | much", experiment)


def test_outcomes_and_the_page_say_what_came_of_it():
    good = case_of(Observed("fine", 3, {"seconds": [1.0, 2.0, 9.0]}))
    outcomes = run_cases(
        [good, case_of(Unexpected("lost\nall")), case_of(Skipped("no server"))], 7, lambda outcome: None
    )
    assert [outcome.status for outcome in outcomes] == ["expected", "unexpected", "skipped"]
    page = page_of(outcomes, 7)
    assert "**3 cases, 3 times tried: 1 as expected, 1 not, 1 skipped.**" in page
    assert "| a &lt;fault> | nothing \\| much | fine | 3 | as expected |" in page
    assert "| a &lt;fault> | nothing \\| much | lost | 0 | **not as expected** |" in page
    assert "| seconds | 2.0 | 9.0 | 3 |" in page


def test_what_was_not_run_now_is_kept(monkeypatch):
    old, new = (case_of(Observed(text, 2, {"s": [1.0]})) for text in ("old", "new"))
    monkeypatch.setitem(CASES, "some", old)
    (before,) = run_cases([old], 0, lambda outcome: None)
    plain = json.loads(json.dumps([before.to_dict(), {**before.to_dict(), "case": "gone"}]))
    assert merged(plain, []) == [before]
    (now,) = run_cases([new], 0, lambda outcome: None)
    assert merged(plain, [now]) == [now]


def test_cases_are_chosen_by_their_names_or_what_they_begin_with():
    assert [case.name for case in choose(["weights-flipped"])] == ["weights-flipped"]
    assert {"weights-flipped", "weights-truncated"} == {case.name for case in choose(["weights"])}
    assert len(choose([])) == len(CASES)
    with pytest.raises(ConfigError, match=r"there is no case 'nothing'"):
        choose(["nothing"])


def test_the_command_lists_them_all():
    command = [sys.executable, "-m", "densenet_dist", "chaos", "--list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines() if not line.startswith(" ")] == [
        case.name for case in in_order()
    ]
