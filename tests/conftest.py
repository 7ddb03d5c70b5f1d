"""Fixtures for all tests: the official CIFAR files, where they lie beside the repository; servers of S3 and MLflow."""

import os
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mlflow_server import mlflow_server as start_mlflow
from s3_server import FaultyServer, bucket
from toy_cifar import Toy, make_toy

from densenet_dist.data import cifar

os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # printed commands are short
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and so would the commands that tests start

PACK = Path(__file__).parents[2] / "shared" / "data"

STARTS_RAY = ("tests/cluster/", "tests/launch/test_start.py")
"""On two cores they run one after another: in one process of pytest-xdist, which begins with them."""

SLOW = (
    *(*STARTS_RAY, "tests/benchmarks/", "tests/chaos/", "tests/docs/test_extending.py", "tests/docs/test_site.py"),
    *("tests/fuzz/test_checkpoint_fuzz.py", "tests/inference/test_demo.py"),
    *("tests/test_notebook.py", "tests/test_packaging.py", "tests/train/test_tensorboard.py"),
    *("tests/train/test_folder.py", "tests/train/test_autotune.py", "tests/train/test_profiling.py"),
    *("tests/train/test_resume.py", "tests/train/test_stopping.py", "tests/trackers/"),
)
"""Left out by `make check`, with what is marked slow."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker("slow")
    items.sort(key=lambda item: not item.nodeid.startswith(STARTS_RAY))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As ``--dist loadfile``, but with all of `STARTS_RAY` as one file."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith(STARTS_RAY) else super()._split_scope(nodeid)

    return Scheduling(config, log)


_started: list[subprocess.Popen[Any]] = []


class _RecordedPopen(subprocess.Popen[Any]):
    """Every process that tests, fixtures and Ray start, for `_nothing_left_running`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        _started.append(self)


subprocess.Popen = _RecordedPopen  # type: ignore[misc]


@pytest.fixture(autouse=True)
def _nothing_left_running() -> Iterator[None]:
    """End the commands and Ray nodes that a test has started and left running, for instance when its time was over."""
    del _started[:]  # of fixtures with a wider scope, which end their own
    yield
    for started in _started:
        if started.poll() is None and re.search("densenet_dist|raylet|gcs_server", str(started.args)):
            with suppress(psutil.Error):
                for process in [*psutil.Process(started.pid).children(recursive=True), started]:
                    process.kill()
            started.wait()


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Train tiny networks with one thread: they gain nothing from more, and the golden losses were written with one."""
    if request.path.parent.name not in ("model", "train", "trackers"):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # before every test, because commands set their own number
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command in this process, in an empty folder; gives its exit code, output and errors."""
    from densenet_dist.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, arguments)))
        assert isinstance(stop.value.code, int)
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the official binary files of both sets, extracted. Not to be written to."""
    if not (PACK / "unpack.py").is_file():
        pytest.skip(f"the CIFAR pack is not at {PACK}")
    out = tmp_path_factory.mktemp("official")
    unpack = [sys.executable, PACK / "unpack.py", "--format", "binary", "--out", out, "--dataset"]
    processes = [subprocess.Popen([*unpack, name], stdout=subprocess.DEVNULL) for name in cifar.SPECS]
    assert [process.wait() for process in processes] == [0, 0]
    return out


@pytest.fixture(scope="session")
def official_archive(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A re-packed archive of the official CIFAR-10 files. Not to be written to."""
    path = tmp_path_factory.mktemp("archive") / cifar.CIFAR10.archive
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(official / cifar.CIFAR10.folder, arcname=cifar.CIFAR10.folder)
    return path


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Toy]:
    """Both sets made small, by name; `load_dataset` takes them for the official ones."""
    made = {name: make_toy(spec) for name, spec in cifar.SPECS.items()}
    for name, toy in made.items():
        monkeypatch.setitem(cifar.SPECS, name, toy.spec)
    return made.__getitem__


@pytest.fixture
def toy(toys: Callable[[str], Toy]) -> Toy:
    """CIFAR-10 made small."""
    return toys("cifar10")


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run with averaged weights. Not to be written to."""
    from runs import run_of, tiny, train

    config = tiny(tmp_path_factory.mktemp("original"), "train.epochs=2", "train.ema_decay=0.5")
    train(config)
    return run_of(config).path


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """``s3://bucket%s?...`` of an S3 server; its credentials are in the environment."""
    with bucket() as address:
        yield address


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server."""
    with start_mlflow(tmp_path_factory.mktemp("mlflow")) as address:
        yield address


@pytest.fixture
def faults() -> Iterator[FaultyServer]:
    """The server of `faulty_s3`."""
    server = FaultyServer()
    yield server
    server.close()


@pytest.fixture
def faulty_s3(s3: str, faults: FaultyServer) -> str:
    """``s3://bucket%s?...`` of the same bucket at `faults`."""
    return f"s3://bucket%s?{faults.query}"
