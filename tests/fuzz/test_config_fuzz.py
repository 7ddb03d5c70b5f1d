"""Whatever a configuration, a sweep file or a setting says: it is resolved, or refused in one message."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

import pytest
import yaml
from fuzzing import alias_bomb, damaged, fuzz, merge_bomb
from hypothesis import given
from hypothesis import strategies as st

from densenet_dist.cli import main
from densenet_dist.config import load_config, to_dict
from densenet_dist.sweep.definition import SETTINGS, SweepConfig
from densenet_dist.yaml_settings import flatten

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
DEFAULTS = flatten(to_dict(load_config()))
SWEEP_DEFAULTS = flatten(SETTINGS.to_dict(SweepConfig()))
KEYS = [*DEFAULTS, "model", "data", "train", "train.schedule", "cluster"]
SWEEP_KEYS = [*SWEEP_DEFAULTS, "scheduler", "search", "settings", "space"]
TRAP = "!!python/object/apply:os.system ['touch ran']"
FITTING = {
    bool: "true false",
    int: "1 2 8 64 0 -1 1000000",
    float: "0.5 1e-3 0 1 -1 1e12",
    list: "[0.5,0.9] [1,2] [2,1,1] [] [1] 3",
    str: "auto cpu ray local a notebook densenet_bc cifar10 folder cosine multistep plateau 12 null",
}
WORDS = """
~ null Null yes False 0 -1 1 2 3.0 1e3 1e999 1e-400 .nan -.Inf nan inf = << 0x10 0o17 0b11 017 1_000 2026-01-01
9223372036854775808 2026-13-01 12:30:45 190:20:30.15 {=:1} {<<:1} {'':1} {.:1} {..b:1} *nowhere &a 'a "a @a `a` %TAG
--- é 漢字 "\\ud800" "\\udc80" "\\0" "\\x1b[31m" "\\U00110000"
"""
NASTY = (
    *WORDS.split(),
    *("2026-01-01 99:99:99", "!!binary '%'", "!!set {a, b}", "!!omap [a: 1]", "!!timestamp x", "!!int x", "!!float ."),
    *("!!bool maybe", "!!str [1]", "!!map [1]", "!!seq {a: 1}", "!custom x", "! x", "!!merge x", "!!value ="),
    *("{<<: {lr: 1}}", "{<<: [1]}", "{? [a]: 1}", "{? {a: 1}: 1}", "{1: 2}", "{~: 1}", "{true: 1}", "&a [*a]"),
    *("&a {b: *a}", "{&a x: 1, y: *a}", "a: b: c", "[1, 2", "{a: 1", "", "\x00", "\x85", "\u2028", "\t x", "\u202e"),
    *("|\n  text", "--- a", "\ufeff", "[" * 3000 + "]" * 3000, "{a: " * 300 + "1" + "}" * 300, "a" * 3000, "a." * 700),
    *("9" * 5000, "0." + "3" * 400, alias_bomb(4, "[]"), alias_bomb(11, "[]"), alias_bomb(11, "{}"), merge_bomb(11)),
    *(TRAP, "!!python/name:os.system", "!!python/tuple [1]", "!<tag:yaml.org,2002:python/name:os> x"),
)


@st.composite
def keys(draw: st.DrawFn, real: list[str]) -> str:
    """A dotted key; now and then one that is nearly it, or none at all."""
    key = draw(st.sampled_from(real))
    if draw(st.integers(0, 5)):
        return key
    place = draw(st.integers(0, len(key) - 1))
    near = (key[:place] + key[place + 1 :], key[:place] + key[place:] * 2, key.upper(), f" {key} ", f"{key}.more")
    return draw(st.sampled_from(near) | st.text(max_size=12))


@st.composite
def values(draw: st.DrawFn, key: str) -> str:
    """YAML of a value: one that may fit the key, a nasty one, or any text."""
    default = {**DEFAULTS, **SWEEP_DEFAULTS}.get(key, "")
    fitting = FITTING.get(type(default), FITTING[str]).split()
    return draw(st.one_of(*[st.sampled_from(fitting), st.sampled_from(NASTY)] * 2, st.text(max_size=20)))


@st.composite
def documents(draw: st.DrawFn) -> str:
    """A configuration file: keys, dotted or nested, with values; or one of the repository, damaged."""
    if draw(st.integers(0, 4)) == 0:
        return draw(damaged(draw(st.sampled_from(FILES)).read_bytes())).decode(errors="surrogateescape")
    lines = []
    for key in draw(st.lists(keys(KEYS), max_size=5)):
        nested = "\n".join("  " * depth + f"{part}:" for depth, part in enumerate(key.split(".")))
        lines.append(f"{draw(st.sampled_from([f'{key}:', f'{key!r}:', nested]))} {draw(values(key))}")
    return "\n".join(lines)


ENDS = "0 1 1.5 2 3 10 1e-300 1e300 1e308 .nan .inf -1e308 -1 1e-3 x"


@st.composite
def domains(draw: st.DrawFn, key: str) -> str:
    """What a sweep file says of one key of its space."""
    few = ", ".join(draw(st.lists(values(key), max_size=3)))
    ends = st.sampled_from([*ENDS.split(), "9" * 400])
    step = draw(st.sampled_from(["", "", ", step: 1", ", step: 0.5", ", step: 0", ", step: 1e-300", ", step: .nan"]))
    kind = draw(st.sampled_from(["uniform", "loguniform", "integer", "loginteger"]))
    span = f"{{{kind}: [{draw(ends)}, {draw(ends)}]{step}}}"
    return draw(st.sampled_from([f"[{few}]", f"{{choice: [{few}]}}", span, span, draw(values(key))]))


@st.composite
def sweeps(draw: st.DrawFn) -> str:
    """A sweep file."""
    own = "".join(f"{key}: {draw(values(key))}\n" for key in draw(st.lists(keys(SWEEP_KEYS), max_size=2)))
    fixed = ", ".join(f"{key}: {draw(values(key))}" for key in draw(st.lists(keys(KEYS), max_size=1)))
    searched = "".join(f"  {key}: {draw(domains(key))}\n" for key in draw(st.lists(keys(KEYS), max_size=3)))
    return f"{own}settings: {{{fixed}}}\nspace:\n{searched}"


@st.composite
def overrides(draw: st.DrawFn, real: list[str]) -> str:
    """A setting on the command line: without NUL, and no option, address or file; non-UTF-8 comes as surrogates."""
    key = draw(keys(real))
    text = f"{key}{draw(st.sampled_from(['=', '=', '=', '==', ' = ', '= ']))}{draw(values(key))}"
    text = text.replace("\x00", "").lstrip("-").replace("://", ":/")
    return text + draw(st.sampled_from(["", "", "", chr(0xDCFF)]))


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory):
    """An empty working folder, so that no setting happens to be the name of a file."""
    with contextlib.chdir(tmp_path_factory.mktemp("fuzz")):
        yield


def config_command(*arguments: str) -> tuple[int, str]:
    """Exit code and output of ``densenet-dist config``, its streams those of a real process."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        main(["config", *arguments])
    message = err.buffer.getvalue().decode()
    assert stop.value.code in (0, 2), message
    if stop.value.code == 0:
        assert message == ""
    else:  # one message, for people
        assert re.match("error: .{13}", message), message
        assert not re.search("\n(error:|Traceback)|this is a bug", message), message
        assert len(message) < 40_000
    return stop.value.code, out.buffer.getvalue().decode()


def require_resolved_or_refused(*arguments: str) -> None:
    """What is printed is a configuration again, and the same one; nothing of it runs."""
    code, out = config_command(*arguments)
    assert not os.path.exists("ran")
    if code == 0:
        Path("again.yaml").write_text(out)
        assert config_command("again.yaml", f"name={yaml.safe_load(out)['name']}") == (0, out)


def written(text: str) -> str:
    Path("written.yaml").write_text(text, encoding="utf-8", errors="surrogateescape")
    return "written.yaml"


@fuzz(3600)
@given(documents())
def test_files(text):
    require_resolved_or_refused(written(text))


@fuzz(3600)
@given(st.lists(overrides(KEYS), min_size=1, max_size=3))
def test_settings(arguments):
    require_resolved_or_refused(*arguments)


@fuzz(2000)
@given(sweeps(), st.lists(overrides([*SWEEP_KEYS, *(f"space.{key}" for key in KEYS)]), max_size=1))
def test_sweeps(text, arguments):
    require_resolved_or_refused(written(text), *arguments)


def test_the_trap_is_a_real_one():
    yaml.load(TRAP, Loader=yaml.UnsafeLoader)
    assert os.path.exists("ran")
    os.unlink("ran")
