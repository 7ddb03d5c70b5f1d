"""Configurations and sweep files as hypothesis draws them: real keys and near misses, values that fit and that do not,
YAML that is legal, odd or broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from densenet_dist.config import load_config, to_dict
from densenet_dist.sweep.definition import SETTINGS
from densenet_dist.sweep.schema import SweepConfig
from densenet_dist.yaml_settings import flatten

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
KEYS = [*flatten(to_dict(load_config())), "model", "data", "train", "train.schedule", "cluster"]
SWEEP_KEYS = [*flatten(SETTINGS.to_dict(SweepConfig())), "scheduler", "search", "settings", "space"]
TRAP = "!!python/object/apply:os.system ['touch {canary}']"


def _laughs(levels: int, brackets: str) -> str:
    """A value that is small as text, and 9**levels values when written out."""
    left, right = brackets
    text = f"[&a0 {left}x: 1{right}" if left == "{" else "[&a0 [x]"
    for level in range(1, levels):
        few = ", ".join(f"*a{level - 1}" if left == "[" else f"k{i}: *a{level - 1}" for i in range(9))
        text += f", &a{level} {left}{few}{right}"
    return f"{text}]"


def _merges(levels: int) -> str:
    """The same by merge keys."""
    text = "[&m0 {x: 1}"
    for level in range(1, levels):
        text += f", &m{level} {{<<: [{', '.join([f'*m{level - 1}'] * 9)}]}}"
    return f"{text}]"


NASTY = (
    *(
        "",
        "~",
        "null",
        "Null",
        "true",
        "yes",
        "on",
        "False",
        "0",
        "-0",
        "-1",
        "1",
        "2",
        "3.0",
        "1e3",
        "1e999",
        "-1e999",
    ),
    *(
        "1e-400",
        ".nan",
        ".NaN",
        ".inf",
        "-.Inf",
        "nan",
        "inf",
        "Infinity",
        "0x10",
        "0o17",
        "0b11",
        "017",
        "1_000",
        "_1",
    ),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775809", "9" * 400, "9" * 5000, "0." + "3" * 400),
    *("2026-01-01", "2026-13-01", "2026-01-01T00:00:00Z", "2026-01-01 99:99:99", "12:30:45", "190:20:30.15"),
    *("!!binary aGk=", "!!binary '%'", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!timestamp x", "!!int x"),
    *("!!float x", "!!bool maybe", "!!null x", "!!str 1", "!!str [1]", "!!map [1]", "!!seq {a: 1}", "!!int ''"),
    *(
        "!!float ''",
        "!!int '-'",
        "!!int 0b",
        "!!float .",
        "!custom x",
        "! x",
        "!<tag:yaml.org,2002:python/name:os.system> x",
    ),
    *(
        "!!merge x",
        "!!value =",
        "=",
        "{=: 1}",
        "<<",
        "{<<: 1}",
        "{<<: {lr: 1}}",
        "{<<: [1]}",
        "{? [a]: 1}",
        "{? {a: 1}: 1}",
    ),
    *("{1: 2}", "{~: 1}", "{true: 1}", "{1.5: 1}", "{2026-01-01: 1}", "{'': 1}", "{.: 1}", "{a.: 1}", "{..b: 1}"),
    *(
        "&a [*a]",
        "&a {b: *a}",
        "*nowhere",
        "[&a 1, *a, *a]",
        "{&a x: 1, y: *a}",
        "&a",
        "- a",
        "a: b: c",
        "[1, 2",
        "{a: 1",
    ),
    *(
        "'a",
        '"a',
        '"\\ud800"',
        '"\\udc80"',
        '"\\0"',
        '"\\x1b[31m"',
        '"\\U00110000"',
        "\u202e",
        "é",
        "漢字",
        "\ufeff",
        "\x00",
    ),
    *("\x85", "\u2028", "\t", "\t x", "# only", "|\n  text", ">\n  text", "@a", "`a`", "%TAG", "---", "...", "--- a"),
    *("[" * 50 + "]" * 50, "[" * 3000 + "]" * 3000, "{a: " * 300 + "1" + "}" * 300, "a" * 3000, "a." * 700 + "a"),
    *(
        _laughs(4, "[]"),
        _laughs(11, "[]"),
        _laughs(11, "{}"),
        _merges(11),
        TRAP,
        "!!python/name:os.system",
        "!!python/tuple [1]",
    ),
)


def _fitting(values: dict[str, Any]) -> dict[str, list[str]]:
    """For each key, texts that have the right type, some of them out of bounds."""
    found = {}
    for key, value in values.items():
        match value:
            case bool():
                found[key] = ["true", "false"]
            case int() | float():
                found[key] = ["1", "2", "8", "64", "0.5", "1e-3", "0", "-1", "1000000", "1e12"]
            case list():
                found[key] = ["[0.5, 0.9]", "[1, 2]", "[2, 1, 1]", "[]", "[1]", "3"]
            case _:
                found[key] = [
                    "auto",
                    "cpu",
                    "ray",
                    "local",
                    "a",
                    "notebook",
                    "cifar10",
                    "folder",
                    "cosine",
                    "12",
                    "null",
                ]
    return found


FITTING = _fitting(flatten(to_dict(load_config())) | flatten(SETTINGS.to_dict(SweepConfig())))
FITTING |= {"model.variant": ["notebook", "densenet", "densenet_bc", "densenet121"], "model.depth": ["40", "100", "7"],
            "model.num_layers": ["2", "[1, 1]", "[]", "[2, 4, 4]", "100000", "[0]"], "model.growth_rate": ["4", "12"],
            "model.compression": ["0.5", "1", "1e-9"], "train.schedule.name": ["multistep", "plateau"]}  # fmt: skip


@st.composite
def keys(draw: st.DrawFn, real: list[str]) -> str:
    """A dotted key; now and then one that is nearly it, or none at all."""
    key = draw(st.sampled_from(real))
    kind = draw(st.sampled_from(["real"] * 6 + ["cut", "doubled", "upper", "spaced", "deeper", "text"]))
    place = draw(st.integers(0, len(key) - 1))
    return {
        "real": key, "cut": key[:place] + key[place + 1 :], "doubled": key[:place] + key[place] + key[place:],
        "upper": key.upper(), "spaced": f" {key} ", "deeper": f"{key}.more",
        "text": draw(st.text(max_size=12)) if kind == "text" else "",
    }[kind]  # fmt: skip


@st.composite
def values(draw: st.DrawFn, key: str) -> str:
    """YAML of a value: one that may fit the key, a nasty one, or any."""
    kind = draw(st.sampled_from(["fitting"] * 4 + ["nasty"] * 4 + ["plain", "text"]))
    if kind == "fitting":
        return draw(st.sampled_from(FITTING.get(key.strip(), ["1"])))
    if kind == "nasty":
        return draw(st.sampled_from(NASTY))
    if kind == "plain":
        return yaml.safe_dump(draw(PLAIN), default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
    return draw(st.text(max_size=20))


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
PLAIN = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@st.composite
def domains(draw: st.DrawFn, key: str) -> str:
    """What a sweep file says of one key of its space."""
    kind = draw(st.sampled_from(["choice", "uniform", "loguniform", "integer", "loginteger", "list", "wrong"]))
    few = ", ".join(draw(st.lists(values(key), min_size=0, max_size=3)))
    if kind == "list":
        return f"[{few}]"
    if kind == "choice":
        return f"{{choice: [{few}]}}"
    if kind == "wrong":
        return draw(values(key))
    ends = draw(st.tuples(*[st.sampled_from(["0", "1", "1.5", "2", "3", "10", "1e-300", "1e300", "1e308", ".nan",
                                             ".inf", "-1e308", "-1", "9" * 400, "1e-3", "x"])] * 2))  # fmt: skip
    step = draw(
        st.sampled_from(
            ["", "", "", ", step: 1", ", step: 0.5", ", step: 0", ", step: 1e-300", ", step: .nan", ", step: x"]
        )
    )
    return f"{{{kind}: [{', '.join(ends)}]{step}}}"


@st.composite
def documents(draw: st.DrawFn, real: list[str]) -> str:
    """A configuration file: some keys, dotted, nested or in braces; or one of the repository with a scratch."""
    if draw(st.integers(0, 4)) == 0:
        return draw(scratched())
    pairs = [(key, draw(values(key))) for key in draw(st.lists(keys(real), max_size=5))]
    return "\n".join(draw(lines(key, value)) for key, value in pairs)


@st.composite
def lines(draw: st.DrawFn, key: str, value: str) -> str:
    """One setting as YAML."""
    parts = key.split(".")
    style = draw(st.sampled_from(["dotted", "nested", "braces", "quoted"]))
    if style == "dotted":
        return f"{key}: {value}"
    if style == "quoted":
        return f"{key!r}: {value}"
    if style == "braces":
        return f"{parts[0]}: " + "".join(f"{{{part}: " for part in parts[1:]) + value + "}" * (len(parts) - 1)
    return "\n".join(f"{'  ' * depth}{part}:" for depth, part in enumerate(parts)) + f" {value}"


@st.composite
def scratched(draw: st.DrawFn) -> str:
    """A file of the repository, cut, doubled, shifted or with something else in the middle."""
    text = draw(st.sampled_from(FILES)).read_text()
    first, second = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    kind = draw(st.sampled_from(["cut", "insert", "double", "drop", "swap"]))
    return {
        "cut": text[:first],
        "insert": text[:first] + draw(st.sampled_from(NASTY)) + text[first:],
        "double": text[:second] + text[first:],
        "drop": text[:first] + text[second:],
        "swap": text[second:] + "\n" + text[:second],
    }[kind]


@st.composite
def sweeps(draw: st.DrawFn) -> str:
    """A sweep file."""
    own = [(key, draw(values(key))) for key in draw(st.lists(keys(SWEEP_KEYS), max_size=2))]
    base = [(key, draw(values(key))) for key in draw(st.lists(keys(KEYS), max_size=1))]
    searched = [(key, draw(domains(key))) for key in draw(st.lists(keys(KEYS), min_size=0, max_size=3))]
    text = "\n".join(f"{key}: {value}" for key, value in own)
    text += "\nsettings: {" + ", ".join(f"{key}: {value}" for key, value in base) + "}\nspace:\n"
    return text + "\n".join(f"  {key}: {value}" for key, value in searched)


@st.composite
def overrides(draw: st.DrawFn, real: list[str]) -> str:
    """A setting of the command line; an argument has no NUL in it."""
    key = draw(keys(real))
    text = f"{key}{draw(st.sampled_from(['=', '=', '=', '==', ' = ', '= ']))}{draw(values(key))}".replace("\x00", "")
    # What is no option, no address and no file; an argument that is no UTF-8 is given as surrogates.
    return f"{text.lstrip('-').replace('://', ':/')}{draw(st.sampled_from(['', '', '', chr(0xDCFF)]))}"
