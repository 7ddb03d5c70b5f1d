"""JSON documents with one value changed into something that somebody who means harm, or a bug, could write."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

NASTY = (
    *(None, True, False, 0, -1, 1, 2**63, 10**30, -(2**31), 0.5, 1e308, float("nan"), float("inf"), "", "x", "..", "/"),
    *("../../outside", "/etc/passwd", ".", "\x00", "\ud800", "a" * 5000, "step-00000001", [], {}, [1], [[]], {"": 1}),
    *({"epoch": 1}, {"epoch": 1, "step": 0, "global_step": 5}, {"epoch": "1", "step": 0, "global_step": 5}),
)
_WHOLE = (
    "",
    "null",
    "[]",
    "{}",
    "1",
    '"x"',
    "[" * 100_000,
    '{"a":' * 100_000,
    "9" * 5000,
    "\ufeff{}",
    "{}{}",
    "{'a': 1}",
)


@st.composite
def forged(draw: st.DrawFn, text: str) -> str:
    """The document with some values or keys replaced, removed or doubled."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from(_WHOLE))
    document = json.loads(text)
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(document))
        if not places:
            break
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "double"]))
        if kind == "remove":
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["x", "..", "/etc/passwd", "../manifest.json", ""]))] = holder.pop(key)
        elif kind == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
    return json.dumps(document)


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)
