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


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small library in place of ours, with a header."""
    monkeypatch.setattr(build, "SOURCE", tmp_path / "native.cpp")
    monkeypatch.setattr(build, "FLAGS", ("-shared", "-fPIC"))
    build.SOURCE.write_text('#include "native_one.h"\nextern "C" int one() { return kOne; }\n')
    (tmp_path / "native_one.h").write_text("constexpr int kOne = 1;\n")
    return build.SOURCE


def test_it_is_built_once(
    tmp_path: Path, source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    monkeypatch.setenv("CXX", script(f'exec {compiler()} "$@"') + " -O1 '-DNAME=two words'")  # options are allowed
    kept = cache / f"native-{build._fingerprint(build._compiler())}.so"
    cache.mkdir(parents=True)
    kept.write_bytes(b"\x7fELF, but no more")  # damaged, it is made anew
    first, second = load(), load()
    assert first.one() == second.one() == 1
    assert first._name == second._name == str(kept)
    assert [line.startswith("-O1 -DNAME=two words -shared") for line in compilations(tmp_path)] == [True]
    assert list(cache.iterdir()) == [kept]


@pytest.mark.parametrize("changed", ["FLAGS", "SOURCE", "header", "_processor", "version"])
def test_for_other_machines_and_sources_it_is_built_anew(
    changed: str, tmp_path: Path, source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    """A home folder may be shared by machines with other processors."""
    monkeypatch.setenv("CXX", script(f"test $1 = --version && echo one || exec {compiler()} $@"))
    assert load().one() == 1
    if changed == "FLAGS":
        monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O2"))
    elif changed == "SOURCE":
        source.write_text('extern "C" int one() { return 3 - 2; }\n')
    elif changed == "header":
        (tmp_path / "native_one.h").write_text("constexpr int kOne = 3 - 2;\n")
    elif changed == "_processor":
        monkeypatch.setattr(build, "_processor", lambda: "flags: other")
    else:
        script(f"test $1 = --version && echo two || exec {compiler()} $@")
    assert load().one() == 1
    assert len(compilations(tmp_path)) == len(list(cache.iterdir())) == 2


def test_processes_that_build_at_once_all_succeed(
    tmp_path: Path, source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    # Neither compiles before both have begun to.
    wait = f"until test $(grep -c native.cpp {tmp_path}/calls) -ge 2; do sleep 0.01; done"
    monkeypatch.setenv("CXX", script(f"test $1 = --version || {{ {wait}; }}; exec {compiler()} $@"))
    code = (
        "import importlib.util, pathlib;"
        f"spec = importlib.util.spec_from_file_location('build', {build.__file__!r});"
        "build = importlib.util.module_from_spec(spec); spec.loader.exec_module(build);"
        f"build.SOURCE = pathlib.Path({str(source)!r});"
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


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("no-such-compiler -O1", "no C++ compiler is found (no-such-compiler)"),
        ("", "no C++ compiler is found (c++, g++, clang++)"),
        ('g++ "-O1', 'CXX=g++ "-O1 is no command: No closing quotation'),
    ],
)
def test_a_compiler_that_is_not_there(
    named: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", named)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError) as caught:
        load()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("exit 3", "cannot compile native.cpp: exit code 3"),
        ("echo In file included from; echo 'x.cpp:1:2: error: no such thing' >&2; echo later >&2; exit 1",
         "cannot compile native.cpp: x.cpp:1:2: error: no such thing"),
        ("printf '\\377 error: not in UTF-8\\n' >&2; exit 1", "error: not in UTF-8"),
        ("exit 0", "cannot be written or loaded"),
        ("exec sleep 60", "compiler cannot be run: .* timed out"),
        ('while [ "$1" != -o ]; do shift; done; echo nothing > "$2"', "cannot be written or loaded"),
    ],
    ids=["silent", "error", "bytes", "nothing made", "hangs", "no library made"],
)  # fmt: skip
def test_what_a_compiler_failed_at_is_said_in_one_line(
    body: str, message: str, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    # Asked for its version it answers at once.
    monkeypatch.setattr(build, "TIMEOUT_S", 1 if "sleep" in body else 60)
    monkeypatch.setenv("CXX", script(f'test "$1" = --version && exit 0; {body}'))
    with pytest.raises(BuildError, match=message) as caught:
        load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["beneath a file", "/proc"])
def test_a_cache_that_cannot_be_written_is_named(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    folder = {"beneath a file": tmp_path / "file" / "cache", "/proc": Path("/proc")}[where]
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    with pytest.raises(BuildError) as caught:
        load()
    assert str(caught.value).startswith(f"{folder}/densenet_dist/native-")
    assert "cannot be written or loaded" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_user_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers that run under a number of no user."""

    def nobody(uid: int) -> object:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(BuildError, match="home"):
        load()


FALLBACK = """
import sys
import warnings

sys.path.insert(0, {support!r})
from fused import Block, assert_same, maps, take_step

with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for bn_size in (None, 2):
        steps = []
        for form in ("reference", "fused"):
            block = Block(form, bn_size=bn_size, drop_rate=0.3, tail="norm and conv")
            assert "dense_block" not in block(maps()).grad_fn.name()
            steps.append(take_step(block, maps()))
        assert_same(*steps, 0)
for warning in seen:
    print(warning.category.__name__, warning.message, sep=": ")
"""


def test_without_the_library_the_reference_form_computes_and_says_so_once() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CXX": "no-such-compiler"}
    code = FALLBACK.format(support=str(Path(__file__).parents[1] / "support"))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "RuntimeWarning: model.block: the reference form is used, not the fused one: "
        "no C++ compiler is found (no-such-compiler)"
    ]
