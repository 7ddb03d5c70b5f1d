"""docs/reliability.md has every case."""

from chaos_page import PAGE, load_results, tables


def test_the_page_has_every_case_as_expected(cases):
    results = load_results()
    assert len(results) >= 65
    assert {result["status"] for result in results.values()} == {"passed"}
    assert {name: (results[name]["fault"], results[name]["expected"]) for name in cases} == cases
    summary, rest = tables(list(results.values()), "MACHINE").split("MACHINE")
    assert summary in PAGE.read_text()
    assert PAGE.read_text().endswith(rest)
