"""Building the passes for CPUs: what is kept, what is said where it cannot be done, and what happens then."""

import os
import pwd
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from densenet_dist.model.kernels import build
from densenet_dist.model.kernels.build import BuildError

load = build.native_library.__wrapped__  # what one process does, however often this one has done it

Script = Callable[[str], str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no compiler named."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "densenet_dist"


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Make a compiler of a few lines of shell; its calls are in the file ``calls``."""

    def make(body: str, name: str = "compiler") -> str:
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


def compiler() -> str:
    found = next((path for name in build.COMPILERS if (path := shutil.which(name))), None)
    assert found, "these tests need a C++ compiler, as the CPU kernels do"
    return found


def compilations(tmp_path: Path) -> list[str]:
    return [line for line in (tmp_path / "calls").read_text().splitlines() if "native.cpp" in line]


def test_it_is_built_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, script: Script) -> None:
    monkeypatch.setenv("CXX", script(f'exec {compiler()} "$@"'))
    first, second = load(), load()
    assert len(compilations(tmp_path)) == 1
    (kept,) = cache.iterdir()
    assert first._name == second._name == str(kept)
    for name in ("bn_relu", "write", "gather", "finish", "conv1x1", "conv1x1_backward"):
        for dtype in ("f32", "f64") if name.startswith("conv1x1") else ("f32", "f64", "bf16"):
            assert getattr(first, f"{name}_{dtype}")


def test_the_compiler_may_be_named_with_options(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    # What it makes is no library.
    named = script('case "$*" in *--version) ;; *) while [ $# -gt 1 ]; do shift; done; echo > "$1" ;; esac')
    for options in ("", " -O1 '-DNAME=two words'"):
        monkeypatch.setenv("CXX", named + options)
        with pytest.raises(BuildError, match="cannot be written or loaded"):
            load()
    assert len(list(cache.iterdir())) == 2
    assert [line.startswith("-O1 -DNAME=two words -std=") for line in compilations(tmp_path)] == [False, True]

    monkeypatch.setenv("CXX", f"{compiler()} -O1")
    assert load().bn_relu_f32


@pytest.mark.parametrize("changed", ["FLAGS", "SOURCE", "header", "_processor", "version"])
def test_for_other_machines_and_sources_it_is_built_anew(
    changed: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    """A home folder may be shared by machines with other processors."""
    monkeypatch.setenv("CXX", script(f"test $1 = --version && echo one || exec {compiler()} $@"))
    monkeypatch.setattr(build, "SOURCE", tmp_path / "native.cpp")
    monkeypatch.setattr(build, "FLAGS", ("-shared", "-fPIC"))
    build.SOURCE.write_text('#include "native_one.h"\nextern "C" int one() { return kOne; }\n')
    header = tmp_path / "native_one.h"
    header.write_text("constexpr int kOne = 1;\n")
    assert load().one() == load().one() == 1
    assert len(compilations(tmp_path)) == 1
    if changed == "FLAGS":
        monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O2"))
    elif changed == "SOURCE":
        build.SOURCE.write_text('extern "C" int one() { return 3 - 2; }\n')
    elif changed == "header":
        header.write_text("constexpr int kOne = 3 - 2;\n")
    elif changed == "_processor":
        monkeypatch.setattr(build, "_processor", lambda: "flags: other")
    else:
        script(f"test $1 = --version && echo two || exec {compiler()} $@")
    assert load().one() == 1
    assert len(compilations(tmp_path)) == len(list(cache.iterdir())) == 2


def test_processes_that_build_at_once_all_succeed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    monkeypatch.setattr(build, "SOURCE", tmp_path / "native.cpp")
    build.SOURCE.write_text('extern "C" int one() { return 1; }\n')
    # Neither compiles before both have begun to.
    wait = f"until test $(grep -c native.cpp {tmp_path}/calls) -ge 2; do sleep 0.01; done"
    monkeypatch.setenv("CXX", script(f"test $1 = --version || {{ {wait}; }}; exec {compiler()} $@"))
    code = (
        "import importlib.util, pathlib;"
        f"spec = importlib.util.spec_from_file_location('build', {build.__file__!r});"
        "build = importlib.util.module_from_spec(spec); spec.loader.exec_module(build);"
        f"build.SOURCE = pathlib.Path({str(build.SOURCE)!r});"
        "assert build.native_library().one() == 1"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    try:
        assert [process.wait(timeout=60) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert len(compilations(tmp_path)) == 2
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("named", ["no-such-compiler", "no-such-compiler -O1", "/"])
def test_a_compiler_that_is_not_there(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", named)
    with pytest.raises(BuildError) as caught:
        load()
    assert str(caught.value) == f"no C++ compiler is found ({named.split()[0]})"


def test_no_compiler_in_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError) as caught:
        load()
    assert str(caught.value) == "no C++ compiler is found (c++, g++, clang++)"


def test_the_first_compiler_of_the_path_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    script("exit 1", "clang++")
    script("exit 1", "g++")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"^g\+\+ cannot compile native.cpp: exit code 1$"):
        load()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("exit 3", "exit code 3"),
        ("echo In file included from; echo 'x.cpp:1:2: error: no such thing' >&2; echo later >&2; exit 1",
         "x.cpp:1:2: error: no such thing"),
        ("echo 'cannot execute cc1plus' >&2; echo later >&2; exit 1", "cannot execute cc1plus"),
        ("printf '\\377 error: not in UTF-8\\n' >&2; exit 1", "error: not in UTF-8"),
    ],
    ids=["silent", "error", "no line with error", "bytes"],
)  # fmt: skip
def test_a_compiler_that_fails_is_quoted_in_one_line(
    body: str, said: str, cache: Path, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    path = script(body)
    monkeypatch.setenv("CXX", path)
    with pytest.raises(BuildError) as caught:
        load()
    message = str(caught.value)
    assert message.startswith(f"{path} cannot compile native.cpp: ")
    assert message.endswith(said)
    assert "\n" not in message
    assert list(cache.iterdir()) == []


def test_sources_that_do_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SOURCE", tmp_path / "native.cpp")
    build.SOURCE.write_text("int one() { return two; }\n")
    with pytest.raises(BuildError, match=r"cannot compile native.cpp: .*two"):
        load()


def test_a_compiler_that_makes_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch, script: Script) -> None:
    monkeypatch.setenv("CXX", script("exit 0"))
    with pytest.raises(BuildError, match="cannot be written or loaded"):
        load()
    assert list(cache.iterdir()) == []


def test_a_compiler_that_hangs(monkeypatch: pytest.MonkeyPatch, script: Script) -> None:
    monkeypatch.setattr(build, "TIMEOUT_S", 0.2)
    monkeypatch.setenv("CXX", script("exec sleep 60"))
    with pytest.raises(BuildError, match=r"compiler cannot be run: .* timed out"):
        load()


def test_a_compiler_that_cannot_be_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "compiler"
    path.write_text("#!/no/such/shell\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(BuildError, match="compiler cannot be run"):
        load()


def test_a_compiler_named_in_a_way_that_no_shell_would_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", 'g++ "-O1')
    with pytest.raises(BuildError, match=r"CXX|quotation"):
        load()


@pytest.mark.parametrize("where", ["file", "beneath a file", "/proc"])
def test_a_cache_that_cannot_be_written_is_named(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    folder = {"file": blocked, "beneath a file": blocked / "cache", "/proc": Path("/proc")}[where]
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    with pytest.raises(BuildError) as caught:
        load()
    assert str(caught.value).startswith(f"{folder}/densenet_dist/native-")
    assert "cannot be written or loaded" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_cache_named_it_is_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    monkeypatch.setenv("CXX", script("exit 1"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    with pytest.raises(BuildError):
        load()
    assert (tmp_path / ".cache" / "densenet_dist").is_dir()


def test_a_user_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers that run under a number of no user."""

    def nobody(uid: int) -> object:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(BuildError, match="home"):
        load()


def test_a_damaged_library_is_made_anew(cache: Path) -> None:
    cache.mkdir(parents=True)
    kept = cache / f"native-{build._fingerprint(build._compiler())}.so"
    kept.write_bytes(b"\x7fELF, but no more")
    load()
    assert kept.stat().st_size > 10_000


def test_a_library_that_cannot_be_loaded_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch, script: Script) -> None:
    monkeypatch.setenv("CXX", script('while [ "$1" != -o ]; do shift; done; echo nothing > "$2"'))
    kept = cache / f"native-{build._fingerprint(build._compiler())}.so"
    with pytest.raises(BuildError, match=f"^{kept} cannot be written or loaded"):
        load()


FALLBACK = """
import warnings
from functools import partial

import torch
from torch import nn

from densenet_dist.model import densenet
from densenet_dist.model.forms import dense_block

torch.set_num_threads(1)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for bn_size in (None, 2):
        results = []
        for form in ("reference", "fused"):
            torch.manual_seed(0)
            norm = partial(nn.BatchNorm2d, momentum=0.01, eps=1e-3)
            options = {"num_layers": 2, "in_channels": 3, "growth_rate": 2, "bn_size": bn_size, "drop_rate": 0.3}
            block = dense_block(form, **options, norm=norm)
            for number in range(2):
                torch.manual_seed(number)
                y = block(torch.randn(2, 3, 4, 4))
                assert "Cat" in y.grad_fn.name()
                y.square().sum().backward()
            results.append([y, *(p.grad for p in block.parameters()), *block.buffers()])
        for expected, found in zip(*results, strict=True):
            assert torch.equal(expected, found)
    logits = []
    for form in ("reference", "fused", "auto"):
        torch.manual_seed(0)
        net = densenet("notebook", num_classes=3, growth_rate=4, num_layers=1, compression=0.5, block=form)
        logits.append(net(torch.ones(2, 3, 32, 32).sin()))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
for warning in seen:
    print(warning.category.__name__, warning.message, sep=": ")
"""


def test_without_the_library_the_reference_form_computes_and_says_so_once() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CXX": "no-such-compiler"}
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "RuntimeWarning: model.block: the reference form is used, not the fused one: "
        "no C++ compiler is found (no-such-compiler)"
    ]
