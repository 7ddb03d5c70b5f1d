"""docs/reliability.md has every case, and a case can tell right from wrong."""

import json

import pytest
from chaos_lab import require_same
from chaos_page import PAGE, load_results, tables


def test_the_page_has_every_case_as_expected(cases):
    page = PAGE.read_text()
    rows = [line for line in page.splitlines() if "| as expected |" in line]
    assert len(rows) == len(load_results()) >= 65
    for name, (fault, expected) in cases.items():
        assert f"| {fault.replace('<', '&lt;')} | {expected} |" in page, name
    assert tables(list(load_results().values()), "").partition(" minutes on ")[0] in page


@pytest.mark.parametrize(
    ("weights", "loss", "differs"), [(b"w", 0.5, None), (b"v", 0.5, "weights"), (b"w", 0.5000001, "metrics.jsonl")]
)
def test_a_difference_between_runs_is_named(tmp_path, weights, loss, differs):
    reference, run = tmp_path / "a", tmp_path / "b"
    for folder, content, value in ((reference, b"w", 0.5), (run, weights, loss)):
        (folder / "checkpoints" / "step-00000003").mkdir(parents=True)
        (folder / "checkpoints" / "step-00000003" / "model.safetensors").write_bytes(content)
        (folder / "metrics.jsonl").write_text(json.dumps({"train/loss": value, "seconds": id(folder)}) + "\n")
        (folder / "tb").mkdir()
    if differs is None:
        require_same(run, reference)
    else:
        with pytest.raises(AssertionError, match=f"{differs} of b differ"):
            require_same(run, reference)
