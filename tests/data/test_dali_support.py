"""Where DALI is missing, broken or cannot work, one message says so with versions and the way out; torch goes on."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE, STDOUT
from textwrap import dedent
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from nvidia import dali
from runs import TINY

from densenet_dist.data.dali_support import driver_versions, explain
from densenet_dist.data.datasets import Split
from densenet_dist.data.engines import make_engine
from densenet_dist.errors import EnvironmentProblem

VERSION = re.escape(str(dali.__version__))
SITE = Path(dali.__file__).parents[2]
needs_no_driver = pytest.mark.skipif(driver_versions()[1] is not None, reason="there is an NVIDIA driver")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

# Answers each line of its input: a new process goes about it as told, and says what came of it.
SERVER = """
import ctypes, json, os, sys, torch, traceback
from densenet_dist.data import dali_support
from densenet_dist.errors import EnvironmentProblem

for line in sys.stdin:
    path, driver, device, decoding = json.loads(line)
    if os.fork() == 0:
        if path:
            sys.path.insert(0, path)
        if driver:
            ctypes.CDLL(driver)  # the linker takes it for any other of the same name
        code, text = 0, ""
        try:
            dali_support.require_dali(torch.device(device), decoding=decoding)
        except EnvironmentProblem as error:
            code, text = error.exit_code, str(error)
        except BaseException:
            code, text = 1, traceback.format_exc()
        print(json.dumps([dali_support.dali_installed(), code, text]), flush=True)
        os._exit(0)
    os.wait()
"""


class Answer(NamedTuple):
    installed: bool
    exit_code: int
    text: str


Ask = Callable[..., Answer]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Asks a new process whether DALI can work, with a folder first on Python's path, or with a driver of its own."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=PIPE, stdout=PIPE, text=True)
    assert server.stdin is not None
    assert server.stdout is not None
    with server.stdin as question, server.stdout as answer:

        def ask(
            path: Path | None = None, driver: Path | None = None, device: str = "cpu", decoding: bool = False
        ) -> Answer:
            question.write(json.dumps([path and str(path), driver and str(driver), device, decoding]) + "\n")
            question.flush()
            return Answer(*json.loads(answer.readline()))

        yield ask
        question.close()
        assert server.wait(timeout=30) == 0


def environment_without(root: Path, *missing: str) -> Path:
    """A folder for Python's path whose package `nvidia` is made of links to this environment's, but for some paths."""
    nvidia = root / "nvidia"
    (nvidia / "dali").mkdir(parents=True)
    for folder in (Path(), Path("dali")):
        for entry in (SITE / "nvidia" / folder).iterdir():
            if str(folder / entry.name) not in (*missing, "dali", "__init__.py", "__pycache__"):
                (nvidia / folder / entry.name).symlink_to(entry)
    # The genuine one would add the genuine folders to the path.
    (nvidia / "__init__.py").touch()
    if "dali" in missing:
        shutil.rmtree(nvidia / "dali")
    return root


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for Python's path that takes DALI away."""
    return environment_without(tmp_path_factory.mktemp("hidden"), "dali")


class TestHere:
    @needs_no_driver
    def test_no_driver(self) -> None:
        split = Split(np.zeros((4, 32, 32, 3), np.uint8), np.arange(4))
        with pytest.raises(EnvironmentProblem, match=rf"DALI {VERSION}.*CUDA 13.*no NVIDIA driver") as raised:
            make_engine("dali", split, mean=(0.0,) * 3, std=(1.0,) * 3, device="cuda")
        assert "data.loader=torch" in str(raised.value)
        assert raised.value.exit_code == 3

    def test_is_imported_only_when_named(self) -> None:
        code = """
            import sys
            import numpy as np
            from densenet_dist.data.datasets import Split
            from densenet_dist.data.engines import make_engine
            from densenet_dist.data.loader import TrainLoader
            split = Split(np.zeros((9, 32, 32, 3), np.uint8), np.arange(9))
            engine = make_engine("torch", split, mean=(0.0,) * 3, std=(1.0,) * 3)
            assert len(list(TrainLoader(split, np.arange(9), engine=engine, global_batch_size=3).epoch(0))) == 3
            assert not any(name.startswith("nvidia") for name in sys.modules)
            make_engine("dali", split, mean=(0.0,) * 3, std=(1.0,) * 3)
            assert "nvidia.dali.fn" in sys.modules
        """
        subprocess.run([sys.executable, "-c", dedent(code)], check=True)


class TestNotInstalled:
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_is_said(self, hidden: Path, ask: Ask, device: str) -> None:
        answer = ask(hidden, device=device)
        assert (answer.installed, answer.exit_code) == (False, 3)
        assert re.search(r"not installed\n.*pip install nvidia-dali-cuda130\n.*data\.loader=torch", answer.text)

    @pytest.mark.nightly
    def test_training_goes_on_with_torch(self, hidden: Path, tmp_path: Path) -> None:
        """Asked for by name or left to the program; asked for DALI, it says what is missing."""
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
        runs = {
            loader: subprocess.Popen(
                [
                    *(sys.executable, "-m", "densenet_dist", "train", "tiny.yaml", f"storage={tmp_path}"),
                    *(f"name={loader}", f"data.loader={loader}", "cluster.engine=local", "train.epochs=1"),
                ],
                cwd=tmp_path,
                env=os.environ | {"PYTHONPATH": str(hidden)},
                stdout=PIPE,
                stderr=STDOUT,
                text=True,
            )
            for loader in ("torch", "auto", "dali")
        }
        said = {loader: run.communicate(timeout=120)[0] for loader, run in runs.items()}
        assert {loader: run.returncode for loader, run in runs.items()} == {"torch": 0, "auto": 0, "dali": 3}, said
        assert "DALI is not installed" in said["auto"]
        assert "DALI is not installed" in said["dali"]
        assert "data.loader=torch" in said["dali"]
        assert "Traceback" not in said["dali"]


class TestBroken:
    def test_a_library_of_its_own_is_missing(self, tmp_path: Path, ask: Ask) -> None:
        answer = ask(environment_without(tmp_path, "dali/libdali_core.so"))
        assert (answer.installed, answer.exit_code) == (True, 3)
        assert re.search(rf"DALI {VERSION} is installed but cannot be imported: libdali_core\.so", answer.text)
        assert re.search(r"pip install --force-reinstall nvidia-dali-cuda130\n.*data\.loader=torch", answer.text)

    def test_the_decoders_are_missing(self, tmp_path: Path, ask: Ask) -> None:
        """That is no matter for images in memory."""
        environment = environment_without(tmp_path, "nvimgcodec")
        assert ask(environment, decoding=False) == (True, 0, "")
        answer = ask(environment, decoding=True)
        assert (answer.installed, answer.exit_code) == (True, 3)
        assert re.search(rf"DALI {VERSION} cannot decode pictures: .*nvidia-nvimgcodec-cu13", answer.text)
        assert re.search(r"pip install nvidia-nvimgcodec-cu13.*\n.*data\.loader=torch", answer.text)


DRIVER = r"""
#include <string.h>
/* A driver that knows VERSION, and whose every call but the first says STATUS. */
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
static int refuse(void) { return STATUS; }
int cuInit(unsigned flags) { return STATUS; }
int cuGetProcAddress_v2(const char *symbol, void **function, int version, unsigned long flags, int *found) {
  if (found) *found = 0;
  *function = !strcmp(symbol, "cuDriverGetVersion") ? (void *)cuDriverGetVersion
            : !strcmp(symbol, "cuGetProcAddress") ? (void *)cuGetProcAddress_v2 : (void *)refuse;
  return 0;
}
"""
NO_DEVICE, UNKNOWN = 100, 999


@needs_no_driver
@needs_compiler
class TestDriver:
    """A made-up libcuda.so.1 stands for a driver."""

    @pytest.fixture
    def driver(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        """Compiled for a version and a status."""
        version, status = request.param
        (tmp_path / "driver.c").write_text(DRIVER)
        library = tmp_path / "libcuda.so.1"
        options = (f"-DVERSION={version}", f"-DSTATUS={status}", "-Wl,-soname,libcuda.so.1")
        subprocess.run(["cc", "-shared", "-fPIC", *options, "-o", library, tmp_path / "driver.c"], check=True)
        return library

    @pytest.mark.parametrize(
        ("driver", "said"),
        [
            ((12040, NO_DEVICE), r"built for CUDA 13, cannot work here: the driver.* knows CUDA 12\.4 at most"),
            ((13050, NO_DEVICE), r"finds no GPU, although the driver.* knows CUDA 13\.5"),
            ((13050, UNKNOWN), ""),  # one that answers with an error of its own, as after an update without a restart
        ],
        indirect=["driver"],
    )
    def test_what_is_wrong_is_said(self, driver: Path, said: str, ask: Ask) -> None:
        answer = ask(driver=driver, device="cuda")
        assert answer.exit_code == 3, answer.text
        assert re.search(rf"DALI {VERSION}.*{said}", answer.text)
        assert "data.loader=torch" in answer.text


class TestExplain:
    def test_a_failure_of_an_operator(self) -> None:
        """DALI's own words, not the way to them: it puts the lines of the pipeline's code before them."""
        from nvidia.dali import fn, pipeline_def

        @pipeline_def(batch_size=1, num_threads=1, device_id=None)
        def pipeline() -> Any:
            image = fn.external_source(source=lambda: [np.zeros((4, 4, 3), np.uint8)], batch=True)
            cut = fn.slice(image, start=[0, 0], shape=[9, 9], axes=[0, 1])
            return fn.flip(cut)

        built = pipeline()
        with pytest.raises(RuntimeError) as raised:
            built.run()
        first = str(explain(raised.value, torch.device("cpu"))).splitlines()[0]
        assert re.fullmatch(rf"DALI {VERSION} failed on cpu: Slice can't be placed out of bounds.*", first)
