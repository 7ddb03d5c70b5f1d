"""What `doctor` finds is shown as text, though a name may look like markup."""

import pytest

from densenet_dist.cli import main


@pytest.mark.parametrize("root", ["[/]", "[link=https://example.org]here"])
def test_names_that_look_like_markup(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "data.name=folder", f'data.root="{root}"', "cluster.engine=local"])
    out = capsys.readouterr().out
    assert stop.value.code == 3
    assert "fault of the program" not in out
    assert root in "".join(out.split())
