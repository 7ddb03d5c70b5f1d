"""What Ray says of a process that was lost, in words for the person who started it."""

from __future__ import annotations

import re
from typing import Any


def explain(error: Any, whose: str) -> str:
    """A crash in one line: what was raised at last, not Ray's wrapping.

    Args:
        error: an exception of Ray's, or the text of one; None where nothing is known.
        whose: process it was, such as "the trial".
    """
    if error is None:
        return f"{whose}'s process was lost"
    name, text = type(error).__name__, str(getattr(error, "cause", None) or error).strip()
    if "OutOfMemory" in name or "running low on memory" in text:  # the node's monitor
        mend = "use a smaller batch, or fewer at a time"
        return f"out of memory: the node had none left, and Ray killed {whose}'s process; {mend}"
    if "ActorDied" in name or "actor died" in text.lower() or "died unexpectedly" in text:
        return f"{whose}'s process was lost (killed, or its node is gone)"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"\s+", " ", lines[-1])[:300] if lines else name
