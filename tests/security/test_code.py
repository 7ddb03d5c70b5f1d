"""What the package's own code never calls: ruff's rules for security find none of it, whatever a ``noqa`` says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RULES = "S102,S202,S301,S302,S306,S307,S310,S323,S501,S506,S602,S604,S605"
BAD = """
exec(text)
tar.extractall(folder)
pickle.load(file)
marshal.load(file)
tempfile.mktemp()
eval(text)
urllib.request.urlopen(url)
ssl._create_unverified_context()
requests.get(url, timeout=1, verify=False)
yaml.load(file, Loader=yaml.Loader)
subprocess.run(text, shell=True)
run(text, shell=True)
os.system(text)
"""


def found(*paths: Path) -> list[str]:
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--preview", "--ignore-noqa"]
    command += ["--select", RULES, "--output-format", "json", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    return sorted(f"{Path(one['filename']).name} {one['code']}" for one in json.loads(done.stdout))


def test_nothing_dangerous_is_called(tmp_path):
    modules = "marshal, os, pickle, requests, ssl, subprocess, tarfile, tempfile, urllib.request, yaml"
    (tmp_path / "bad.py").write_text(f"import {modules}\ntar = tarfile.open(name)\n{BAD}")
    assert found(tmp_path) == [f"bad.py {rule}" for rule in RULES.split(",")]  # each would be found
    assert found(ROOT / "densenet_dist", ROOT / "launch") == 2 * ["cifar_source.py S310"] + ["yaml_settings.py S506"]
    sources = [path for folder in ("densenet_dist", "launch") for path in (ROOT / folder).rglob("*.py")]
    text = "".join(path.read_text() for path in sources)
    assert "torch.load(" in text
    for unsafe in ("weights_only=False", "allow_pickle=True", "torch.hub.load", "Unpickler", "cloudpickle.load"):
        assert unsafe not in text
