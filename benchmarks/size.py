"""Print the size of the repository: lines, modules, classes, functions, comments and words; `make size` runs it."""

from __future__ import annotations

import ast
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOOP = ("fit", "train_epoch", "train_step", "save_or_stop")
"""The training loop: functions of densenet_dist/train/loop.py."""


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def words(*pages: Path) -> int:
    return sum(len(page.read_text().split()) for page in pages)


def functions(tree: ast.Module) -> dict[str, int]:
    """The lines of every function, by `name:line`."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {f"{node.name}:{node.lineno}": (node.end_lineno or 0) - node.lineno + 1 for node in found}


def comments(path: Path) -> int:
    with path.open("rb") as file:
        return sum(token.type == tokenize.COMMENT for token in tokenize.tokenize(file.readline))


def sizes() -> dict[str, float]:
    """All figures by their names."""
    package = sorted((ROOT / "densenet_dist").rglob("*.py"))
    trees = {path: ast.parse(path.read_text()) for path in package}
    lengths = [length for tree in trees.values() for length in functions(tree).values()]
    total = sum(map(lines, package))
    pages = (page for page in (ROOT / "docs").rglob("*.md") if page.name != "log.md")
    path = re.findall(r"^\| \[(\S+\.py)\]", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    loop = functions(trees[ROOT / "densenet_dist" / "train" / "loop.py"])
    return {
        "lines of densenet_dist": total,
        "modules": len(package),
        "classes": sum(isinstance(node, ast.ClassDef) for tree in trees.values() for node in ast.walk(tree)),
        "mean length of a function": round(sum(lengths) / len(lengths), 1),
        "comment lines per 100 lines": round(100 * sum(map(comments, package)) / total, 1),
        "lines of the main path": sum(lines(ROOT / name) for name in path),
        "lines of the training loop": sum(length for name, length in loop.items() if name.partition(":")[0] in LOOP),
        "lines of tests": sum(map(lines, (ROOT / "tests").rglob("*.py"))),
        "words of README.md": words(ROOT / "README.md"),
        "words of docs without the log": words(*pages),
    }


if __name__ == "__main__":
    for name, figure in sizes().items():
        print(f"{figure:>9,} {name}")
