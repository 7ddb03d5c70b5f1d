"""Compiling the CPU kernels: the cache, error messages, and the fallback to the reference form."""

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fused import Block, assert_same, maps, take_step

from densenet_dist.model import fused_block, kernels
from densenet_dist.model.kernels import build
from densenet_dist.model.kernels.build import BuildError

load = build.native_library.__wrapped__  # without the process-wide cache

Script = Callable[[str], str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Use an empty cache, no CXX and a umask of 0."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    umask = os.umask(0)
    yield tmp_path / "cache" / "densenet_dist"
    os.umask(umask)


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Return a function that makes a compiler from shell code; it logs its calls in the file ``calls``."""

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
    """Replace the kernels by a small library with a header."""
    monkeypatch.setattr(build, "SOURCE", tmp_path / "native.cpp")
    monkeypatch.setattr(build, "FLAGS", ("-shared", "-fPIC"))
    build.SOURCE.write_text('#include "native_one.h"\nextern "C" int one() { return kOne; }\n')
    (tmp_path / "native_one.h").write_text("constexpr int kOne = 1;\n")
    return build.SOURCE


def test_it_is_built_once(
    tmp_path: Path, source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    monkeypatch.setenv("CXX", script(f'exec {compiler()} "$@"') + " -O1 '-DNAME=two words'")  # CXX may have options
    kept = cache / f"native-{build._fingerprint(build.compiler())}.so"
    cache.mkdir(mode=0o700, parents=True)
    kept.write_bytes(b"\x7fELF, but no more")  # damaged: compiled again
    first, second = load(), load()
    assert first.one() == second.one() == 1
    assert first._name == second._name == str(kept)
    assert [line.startswith("-O1 -DNAME=two words -shared") for line in compilations(tmp_path)] == [True]
    assert list(cache.iterdir()) == [kept]


def test_other_machines_and_sources_have_their_own_library(
    tmp_path: Path, source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    """A home folder may be shared by machines with other processors."""
    monkeypatch.setenv("CXX", script(f"test $1 = --version && echo one || exec {compiler()} $@"))
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O2")),
        lambda: (tmp_path / "native_one.h").write_text("constexpr int kOne = 3 - 2;\n"),
        lambda: source.write_text('extern "C" int one() { return 3 - 2; }\n'),
        lambda: monkeypatch.setattr(build, "_processor", lambda: "flags: other"),
        lambda: script(f"test $1 = --version && echo two || exec {compiler()} $@"),
    ]
    for number, change in enumerate(changes, start=1):
        change()
        assert load().one() == 1
        assert len(compilations(tmp_path)) == len(list(cache.iterdir())) == number


def test_concurrent_builds_succeed(
    tmp_path: Path, source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    # Both have started before either compiles.
    wait = f"until test $(grep -c native.cpp {tmp_path}/calls) -ge 2; do sleep 0.01; done"
    monkeypatch.setenv("CXX", script(f"test $1 = --version || {{ {wait}; }}; exec {compiler()} $@"))
    with ThreadPoolExecutor(2) as pool:
        assert [library.one() for library in pool.map(lambda _: load(), range(2))] == [1, 1]
    assert len(compilations(tmp_path)) == 2
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("", "no C++ compiler is found (c++, g++, clang++)"),
        ('g++ "-O1', 'CXX=g++ "-O1 cannot be split into words: No closing quotation'),
    ],
)
def test_missing_compiler(named: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", named)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError) as caught:
        load()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo In file included from; echo 'x.cpp:1:2: error: no such thing' >&2; echo later >&2; exit 1",
         "cannot compile native.cpp: x.cpp:1:2: error: no such thing"),
        ("printf '\\377 error: not in UTF-8\\n' >&2; exit 1", "error: not in UTF-8"),
        ("exec sleep 60", "compiler cannot be run: .* timed out"),
        ('while [ "$1" != -o ]; do shift; done; echo nothing > "$2"', "kernels cannot be used: .*too short"),
    ],
    ids=["error", "bytes", "hangs", "no library made"],
)  # fmt: skip
def test_compiler_errors_are_one_line(body: str, message: str, monkeypatch: pytest.MonkeyPatch, script: Script) -> None:
    monkeypatch.setattr(build, "TIMEOUT_S", 1 if "sleep" in body else 60)
    monkeypatch.setenv("CXX", script(f'test "$1" = --version && exit 0; {body}'))
    with pytest.raises(BuildError, match=message) as caught:
        load()
    assert "\n" not in str(caught.value)


def test_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    with pytest.raises(BuildError, match=r"^the cache of compiled kernels cannot be used: .*/proc/densenet_dist"):
        load()


OPEN = (lambda path: path.chmod(0o777), lambda path: path.chmod(0o770), lambda path: os.chown(path, 12345, -1))


@pytest.mark.parametrize("open_to_others", OPEN if os.geteuid() == 0 else OPEN[:2])
def test_a_cache_that_others_can_write_to_is_not_used(
    open_to_others: Callable[[Path], None], cache: Path, source: Path
) -> None:
    library = Path(load()._name)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (cache, library)] == [0o700, 0o700]
    made = library.stat().st_ino
    open_to_others(library)
    assert load().one() == 1
    assert library.stat().st_ino != made, "one that others could have written is made anew"
    open_to_others(cache)
    with pytest.raises(BuildError, match=f"other users can write to {cache}: chmod go-w it, or set DENSENET"):
        load()


def test_without_the_library_the_reference_form_is_used_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    known = (build.native_library, kernels.unavailable, kernels._native, fused_block._warn_once)
    for function in known:
        function.cache_clear()
    blocks = [
        Block(form, bn_size=bn_size, drop_rate=0.3, tail="norm and conv")
        for bn_size in (None, 2)
        for form in ("reference", "fused")
    ]
    try:
        with pytest.warns(RuntimeWarning) as warned:
            steps = [take_step(block, maps()) for block in blocks]
    finally:
        for function in known:
            function.cache_clear()
    assert_same(steps[0], steps[1], 0)
    assert_same(steps[2], steps[3], 0)
    assert [str(warning.message) for warning in warned] == [
        "model.block: the reference form is used, not the fused one: no C++ compiler is found (no-such-compiler)"
    ]
