"""docs/reliability.md has every case, and a case can tell right from wrong."""

import json

import pytest
from chaos_lab import require_same
from chaos_page import PAGE, load_results, page_of


def test_the_page_has_every_case_as_expected(cases):
    page = PAGE.read_text()
    rows = [line for line in page.splitlines() if "| as expected |" in line]
    assert len(rows) == len(load_results()) >= 65
    for name, (fault, expected) in cases.items():
        assert f"| {fault.replace('<', '&lt;')} | {expected} |" in page, name
    assert page.startswith(page_of(list(load_results().values()), "").partition(" minutes on ")[0])


def test_the_page_says_what_came_of_a_case():
    common = {"group": "Soak", "fault": "a <fault>", "expected": "nothing | much", "count": 3, "seconds": 60}
    common |= {"commit": "0123456789", "date": "2026-01-02"}
    passed = common | {"status": "passed", "observed": "fine"}
    failed = common | {"status": "failed", "observed": "lost\nall"}
    page = page_of([passed, failed], "2 cores")
    assert "**2 cases, 6 times tried: 1 as expected, 1 not, 0 skipped.** 2 minutes on 2 cores." in page
    assert "| a &lt;fault> | nothing \\| much | fine | 3 | as expected | 0123456789, 2026-01-02 |" in page
    assert "| a &lt;fault> | nothing \\| much | lost | 3 | **not as expected** | 0123456789, 2026-01-02 |" in page


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
