"""Input that is made to do harm. That nothing of it runs is proven by a file that it would write."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
import tarfile
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from densenet_dist.chaos.case import add, case
from densenet_dist.chaos.lab import Lab, Observed, Started, expect, write_pictures

_GROUP: Final = "Hostile input"
_LOCAL: Final = ("cluster.engine=local",)


class _Writes:
    """Pickled, a call that writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "it ran")


def _refused(run: Started, code: int, canary: Path, *words: str) -> None:
    found = run.wait()
    expect(not canary.exists(), "what it held was run")
    expect(found == code, f"exit code {found}, not {code}:\n{run.text[-2000:]}")
    expect("Traceback" not in run.text, f"a traceback:\n{run.text[-2000:]}")
    for text in words:
        expect(text in run.text, f"it does not say {text!r}:\n{run.text[-2000:]}")


def poisoned_checkpoint(checksum_too: bool, lab: Lab) -> Observed:
    """A checkpoint whose optimizer state is a pickle that runs code, from whoever gave the run away."""
    run = lab.begin(*_LOCAL)
    run.wait_for_step(10)
    run.kill_all()
    canary = lab.folder / lab.name("canary")
    for folder in (run.folder / "checkpoints").glob("step-*"):
        content = pickle.dumps(_Writes(canary))
        (folder / "state.pt").write_bytes(content)
        if checksum_too:
            meta = json.loads((folder / "checkpoint.json").read_text())
            meta["sha256"]["state.pt"] = hashlib.sha256(content).hexdigest()
            (folder / "checkpoint.json").write_text(json.dumps(meta))
    _refused(lab.begin(resume=run.folder), 6, canary, "no checkpoint of this run is whole")
    return Observed("exit 6; nothing ran")


for _name, _what, _right in (
    ("poisoned-checkpoint", "a checkpoint's state is a pickle that runs code", False),
    ("poisoned-checkpoint-right-checksum", "the same, with the right checksum beside it", True),
):
    add(_name, _GROUP, _what, "exit 6; nothing of it runs", partial(poisoned_checkpoint, _right))


@case(
    _GROUP, "CIFAR-10 as the pickled files of its Python version, one of which runs code", "exit 4; nothing of it runs"
)
def poisoned_data(lab: Lab) -> Observed:
    """Only the binary version is ever read."""
    root, canary = lab.folder / lab.name("data"), lab.folder / lab.name("canary")
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (folder / name).write_bytes(pickle.dumps(_Writes(canary)))
    settings = ("data.name=cifar10", f"data.root={root}", "data.download=false", "data.limit=null")
    _refused(lab.begin(*_LOCAL, *settings), 4, canary)
    return Observed("exit 4; nothing ran")


def configured(text: str, words: str, lab: Lab) -> Observed:
    """A configuration that somebody else wrote."""
    canary = lab.folder / lab.name("canary")
    path = lab.folder / f"{lab.name('config')}.yaml"
    path.write_text(text.replace("CANARY", str(canary)))
    command = [sys.executable, "-m", "densenet_dist", "train", str(path), f"storage={lab.folder}"]
    _refused(lab.run(command, lab.folder / path.stem), 2, canary, words)
    return Observed("exit 2; nothing ran")


_NINE: Final = ", ".join(["{}"] * 9)
_BOMB: Final = f"a: &a [{_NINE.replace('{}', 'x')}]\n" + "".join(
    f"{after}: &{after} [{_NINE.replace('{}', '*' + before)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
_CALL: Final = 'name: !!python/object/apply:os.system ["touch CANARY"]\n'
for _name, _what, _text, _words in (
    ("yaml-object", "a configuration with a YAML tag that calls a function", _CALL, "python/object"),
    ("yaml-duplicate", "a configuration that gives a key twice", "train: {lr: 0.1}\ntrain: {lr: 0.2}\n", "train"),
    ("yaml-bomb", "a configuration of aliases that grows to 9^9 items", _BOMB, ""),
    ("yaml-path", "a run's name that leads out of the storage folder", "name: ../../etc/run\n", "name"),
):  # fmt: skip
    add(_name, _GROUP, _what, "exit 2, the place named; nothing of it runs", partial(configured, _text, _words))


@case(_GROUP, "an archive of CIFAR-10, given by data.url, that is another one", "exit 4; nothing of it is unpacked")
def poisoned_archive(lab: Lab) -> Observed:
    """It has a member that climbs out of the folder, and an absolute one; its hash is not the known one."""
    root, canary = lab.folder / lab.name("data"), lab.folder / lab.name("canary")
    root.mkdir()
    archive = root / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in (f"../{canary.name}", str(canary)):
            info = tarfile.TarInfo(name)
            info.size = 6
            tar.addfile(info, BytesIO(b"it ran"))
    settings = ("data.name=cifar10", f"data.root={root}", f"data.url={archive.as_uri()}", "data.limit=null")
    run = lab.begin(*_LOCAL, *settings)
    found = run.wait()
    expect(found in (2, 4) and not canary.exists(), f"exit code {found}:\n{run.text[-2000:]}")
    return Observed(f"exit {found}; nothing was unpacked")


@case(
    _GROUP,
    "secrets in the environment: storage and tracking credentials, a Ray token",
    "none is in any file of the run, in what it prints, or in TensorBoard",
)
def secrets(lab: Lab) -> Observed:
    """A marker in each, looked for in every byte."""
    marker = "s3cr3t-marker-0123456789"
    names = (
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "RAY_AUTH_TOKEN",
        "WANDB_API_KEY",
        "GITHUB_TOKEN",
        "DB_PASSWORD",
    )
    run = lab.begin("cluster.workers=2", environment=dict.fromkeys(names, marker))
    expect(run.wait() == 0, run.text[-2000:])
    files = [path for path in run.folder.rglob("*") if path.is_file()] + [run.output]
    found = [str(path) for path in files if marker.encode() in path.read_bytes()]
    expect(not found, f"found in {found}")
    return Observed(f"in none of {len(files)} files", len(names))


@case(_GROUP, "a class whose name is HTML", "the report shows it as text; no script of it is in it")
def html_names(lab: Lab) -> Observed:
    """Names of folders of pictures come from whoever made the data set."""
    pictures = lab.folder / lab.name("pictures")
    write_pictures(pictures, ("fine", "<img src=x onerror=alert(1)>"))
    settings = ("data.name=folder", f"data.root={pictures}", "data.image_size=32", "data.limit=null", "train.epochs=1")
    run = lab.begin(*_LOCAL, *settings)
    expect(run.wait() == 0, run.text[-2000:])
    page = (run.folder / "report.html").read_text()
    expect("<img src=x" not in page, "the class's name is in the page as HTML")
    expect("&lt;img src=x" in page, "the class's name is not in the page")
    return Observed("shown as text")
