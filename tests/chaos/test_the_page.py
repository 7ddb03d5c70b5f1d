"""docs/reliability.md has every case."""

import json

import pytest
from chaos_lab import require_same
from chaos_page import PAGE, load_results, tables


def test_the_page_has_every_case_as_expected(cases):
    results = load_results()
    assert len(results) >= 49
    assert {result["status"] for result in results.values()} == {"passed"}
    assert {name: (results[name]["fault"], results[name]["expected"]) for name in cases} == cases
    summary, rest = tables(list(results.values()), "MACHINE").split("MACHINE")
    assert summary in PAGE.read_text()
    assert PAGE.read_text().endswith(rest)


@pytest.mark.parametrize(
    ("weights", "loss", "differs"), [(b"w", 0.5, None), (b"v", 0.5, "weights"), (b"w", 0.5000001, "metrics.jsonl")]
)
def test_a_difference_between_runs_is_named(tmp_path, weights, loss, differs):
    reference, run = tmp_path / "a", tmp_path / "b"
    for folder, content, value in ((reference, b"w", 0.5), (run, weights, loss)):
        (folder / "checkpoints" / "step-3").mkdir(parents=True)
        (folder / "checkpoints" / "manifest.json").write_text('{"checkpoints": [{"name": "step-3"}]}')
        (folder / "checkpoints" / "step-3" / "model.safetensors").write_bytes(content)
        (folder / "metrics.jsonl").write_text(json.dumps({"train/loss": value, "seconds": id(folder)}) + "\n")
        (folder / "tb").mkdir()
    if differs is None:
        require_same(run, reference)
    else:
        with pytest.raises(AssertionError, match=f"{differs} of b differ"):
            require_same(run, reference)
