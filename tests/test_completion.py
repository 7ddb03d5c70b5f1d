"""Completion is Typer's; ours are the names of the configurations that come with the package."""

import pytest

from densenet_dist import bundled
from densenet_dist.cli import main


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("densenet-dist tra", ["train"]),
        ("densenet-dist train quick", ["quickstart"]),
        ("densenet-dist tune sweep_", [name for name in bundled.names() if name.startswith("sweep_")]),
        ("densenet-dist evaluate --che", ["--checkpoint"]),
        ("densenet-dist train mine/", []),  # files, by the shell
    ],
)
def test_what_tab_offers_in_bash(monkeypatch, capsys, line, offered):
    monkeypatch.setenv("_DENSENET_DIST_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line.replace(" ", "\n"))
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().out.split() == offered
