"""Scratches: what happens to bytes on disks, on the way, and in the hands of somebody who means harm."""

from __future__ import annotations

from hypothesis import strategies as st

_WORDS = (
    b"\x00" * 8,
    b"\xff" * 8,
    b"\x00\x00\x00\x00",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x80\x00\x00\x00",
    b"..",
    b"/",
)
_KINDS = ("set", "flip", "cut", "insert", "delete", "double", "fill", "append")


@st.composite
def scratched(draw: st.DrawFn, data: bytes, most: int = 3) -> bytes:
    """The same bytes with one to `most` scratches; the beginning, where formats say how long things are, more often."""
    for _ in range(draw(st.integers(1, most))):
        if not data:
            return draw(st.binary(max_size=40))
        near = min(len(data) - 1, 120)
        place = draw(
            st.integers(0, near) | st.integers(0, len(data) - 1) | st.integers(max(0, len(data) - 200), len(data) - 1)
        )
        length = draw(st.sampled_from([1, 2, 4, 8, 64, 1000]))
        kind = draw(st.sampled_from(_KINDS))
        word = draw(st.sampled_from(_WORDS) | st.binary(min_size=1, max_size=8))
        before, after = data[:place], data[place:]
        if kind == "set":
            data = before + word + after[len(word) :]
        elif kind == "flip":
            data = before + bytes([after[0] ^ (1 << draw(st.integers(0, 7)))]) + after[1:]
        else:
            data = {"cut": before, "insert": before + word + after, "delete": before + after[length:],
                    "double": before + after[:length] + after, "fill": before + bytes(length) + after[length:],
                    "append": data + word}[kind]  # fmt: skip
    return data
