"""docs/reliability.md has every case."""

from chaos_page import PAGE, load_results, tables


def test_the_page_has_every_case_as_expected(cases):
    page = PAGE.read_text()
    rows = [line for line in page.splitlines() if "| as expected |" in line]
    assert len(rows) == len(load_results()) >= 49
    for name, (fault, expected) in cases.items():
        assert f"| {fault.replace('<', '&lt;')} | {expected} |" in page, name
    assert tables(list(load_results().values()), "").partition(" minutes on ")[0] in page
