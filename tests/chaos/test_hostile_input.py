"""Input that is made to do harm. If any of it ran, it would write a file: the canary."""

import hashlib
import json
import pickle
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from chaos_lab import LOCAL, Lab, cases, write_pictures

CALL = 'name: !!python/object/apply:os.system ["touch CANARY"]\n'
NINE = ", ".join(["{}"] * 9)
BOMB = f"a: &a [{NINE.replace('{}', 'x')}]\n" + "".join(
    f"{after}: &{after} [{NINE.replace('{}', '*' + before)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


class Writes:
    """Pickled, a call that writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "it ran")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.mark.parametrize(
    "with_checksum",
    cases(
        "exit 6; nothing runs",
        ("poisoned", "a checkpoint whose state is a pickle with code: wrong checksum", False),
        ("right-checksum", "a checkpoint whose state is a pickle with code: matching checksum", True),
    ),
)
def test_poisoned_checkpoint(lab: Lab, canary: Path, with_checksum: bool) -> None:
    run = lab.begin_and_kill(10)
    for folder in (run.folder / "checkpoints").glob("step-*"):
        content = pickle.dumps(Writes(canary))
        (folder / "state.pt").write_bytes(content)
        if with_checksum:
            meta = json.loads((folder / "checkpoint.json").read_text())
            meta["sha256"]["state.pt"] = hashlib.sha256(content).hexdigest()
            (folder / "checkpoint.json").write_text(json.dumps(meta))
    lab.begin(resume=run.folder).fail(6, "all checkpoints of this run are damaged")
    assert not canary.exists(), "it was run"
    lab.observe("exit 6; nothing ran")


@pytest.mark.fault("CIFAR-10 as pickled Python files, one of them with code", "exit 4; nothing runs")
def test_poisoned_data(lab: Lab, canary: Path) -> None:
    root = lab.folder / "data"
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps(Writes(canary)))
    settings = ("data.name=cifar10", f"data.root={root}", "data.download=false", "data.limit=null")
    lab.begin(*LOCAL, *settings).fail(4)
    assert not canary.exists(), "it was run"
    lab.observe("exit 4; nothing ran")


HOSTILE = (
    ("yaml-object", "a YAML tag that calls a function", CALL, "python/object"),
    ("yaml-duplicate", "a key given twice", "train: {lr: 0.1}\ntrain: {lr: 0.2}\n", "train"),
    ("yaml-bomb", "aliases that expand to 9^9 items", BOMB, ""),
    ("yaml-path", "a run name that leads out of the storage folder", "name: ../../etc/run\n", "name"),
)


@pytest.mark.parametrize(
    ("text", "words"),
    cases(
        "exit 2, naming the place; nothing runs",
        *((name, f"in a configuration: {what}", *values) for name, what, *values in HOSTILE),
    ),
)
def test_hostile_configuration(lab: Lab, canary: Path, text: str, words: str) -> None:
    path = lab.folder / "hostile.yaml"
    path.write_text(text.replace("CANARY", str(canary)))
    command = [sys.executable, "-m", "densenet_dist", "train", str(path), f"storage={lab.folder}"]
    lab.run(command, lab.folder / path.stem).fail(2, words)
    assert not canary.exists(), "it was run"
    lab.observe("exit 2; nothing ran")


@pytest.mark.fault("data.url leads to an archive that is not CIFAR-10", "exit 4; nothing is unpacked")
def test_poisoned_archive(lab: Lab, canary: Path) -> None:
    # It has a member that climbs out of the folder, and an absolute one; its hash is not the known one.
    root = lab.folder / "data"
    root.mkdir()
    archive = root / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in (f"../{canary.name}", str(canary)):
            info = tarfile.TarInfo(name)
            info.size = 6
            tar.addfile(info, BytesIO(b"it ran"))
    settings = ("data.name=cifar10", f"data.root={root}", f"data.url={archive.as_uri()}", "data.limit=null")
    lab.begin(*LOCAL, *settings).fail(4)
    assert not canary.exists(), "it was unpacked"
    lab.observe("exit 4; nothing was unpacked")


@pytest.mark.fault(
    "storage and tracking credentials and a Ray token in the environment",
    "not in the files, the output or the TensorBoard events of the run",
)
def test_secrets(lab: Lab) -> None:
    marker = "s3cr3t-marker-0123456789"
    names = ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN"]
    names += ["WANDB_API_KEY", "GITHUB_TOKEN", "DB_PASSWORD"]
    run = lab.begin("cluster.workers=2", environment=dict.fromkeys(names, marker))
    run.end(0)
    files = [path for path in run.folder.rglob("*") if path.is_file()] + [run.output]
    found = [str(path) for path in files if marker.encode() in path.read_bytes()]
    assert not found, f"found in {found}"
    lab.observe(f"in none of {len(files)} files", len(names))


@pytest.mark.fault("a class whose name is HTML", "the report shows it as text")
def test_html_names(lab: Lab) -> None:
    settings = write_pictures(lab.folder / "pictures", "fine", "<img src=x onerror=alert(1)>")
    run = lab.begin(*LOCAL, *settings, "train.epochs=1")
    run.end(0)
    page = (run.folder / "report.html").read_text()
    assert "<img src=x" not in page, "the class's name is in the page as HTML"
    assert "&lt;img src=x" in page, "the class's name is not in the page"
    lab.observe("shown as text")
