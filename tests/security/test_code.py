"""What the package's own code never does, read from its syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import densenet_dist
from densenet_dist import yaml_settings

ROOT = Path(__file__).parents[2]
FILES = sorted([*Path(densenet_dist.__file__).parent.rglob("*.py"), *(ROOT / "launch").rglob("*.py")])
NEVER = (
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads"),
    *("pickle.Unpickler",),
    *("marshal.load", "marshal.loads", "shelve.open", "dill.load", "dill.loads", "joblib.load", "cloudpickle.load"),
    *("cloudpickle.loads", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "tempfile.mktemp", "torch.hub.load"),
    *("ssl._create_unverified_context", "pandas.read_pickle", "urllib.request.urlopen"),
)


def findings(tree: ast.AST) -> Iterator[str]:
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found = wrong(_full_name(node.func, names), {key.arg: key.value for key in node.keywords})
            if found:
                yield f"line {node.lineno}: {found}"


def _full_name(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_full_name(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def wrong(name: str, keywords: dict[str | None, ast.expr]) -> str | None:
    """What is wrong with a call of that name with these keywords."""

    def said(key: str) -> object:
        value = keywords.get(key)
        return value.value if isinstance(value, ast.Constant) else value and ast.unparse(value)

    if name in NEVER:
        return name
    if name == "torch.load" and said("weights_only") is not True:
        return "torch.load without weights_only=True"
    if name in ("numpy.load", "np.load") and said("allow_pickle") not in (None, False):
        return "np.load that unpickles"
    if name == "yaml.load" and said("Loader") != "_Loader":
        return "yaml.load"
    if said("shell") not in (None, False):
        return f"{name} with a shell"
    if name.endswith(".extractall") and said("filter") != "data":
        return f"{name} without filter='data'"
    if said("verify") is False or said("check_hostname") is False:
        return f"{name} without checking certificates"
    return None


def test_nothing_dangerous_is_called():
    found = {str(path.relative_to(ROOT)): list(findings(ast.parse(path.read_text()))) for path in FILES}
    assert len(found) > 50
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_the_one_yaml_loader_is_a_safe_one():
    assert issubclass(yaml_settings._Loader, yaml.SafeLoader)
    assert not any("python" in str(tag) for tag in yaml_settings._Loader.yaml_constructors)


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')",
        "import pickle\npickle.loads(b'')",
        "from torch import load\nload(f, weights_only=False)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import yaml\nyaml.load(f, Loader=yaml.Loader)",
        "import subprocess as s\ns.run('x', shell=True)",
        "with tarfile.open(f) as tar:\n tar.extractall(p)",
        "import requests\nrequests.get(u, verify=False)",
        "from urllib.request import urlopen\nurlopen(u)",
    ],
)
def test_each_would_be_found(code: str):
    assert len(list(findings(ast.parse(code)))) == 1
