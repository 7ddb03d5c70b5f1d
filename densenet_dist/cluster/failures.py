"""Short descriptions of crashed processes, from Ray's exceptions."""

from __future__ import annotations

import re
from typing import Any


def explain_crash(error: Any, owner: str) -> str:
    """Describe a crash in one line: its original cause, without Ray's wrapping.

    Args:
        error: an exception raised by Ray, or the text of one; None if the cause is unknown.
        owner: of the process, such as "the trial".
    """
    if not error:
        return f"{owner}'s process was lost"
    name, text = type(error).__name__, str(getattr(error, "cause", None) or error).strip()
    if "OutOfMemory" in name or "running low on memory" in text:  # Ray's memory monitor
        fix = "use smaller batches, or run fewer workers or trials at a time"
        return f"out of memory: the node had none left, and Ray killed {owner}'s process; {fix}"
    if found := re.search(r"health check has been hanging for ([\d.]+)", text):
        return f"{owner}'s process did not respond for {float(found[1]):.0f} s"
    if "ActorDied" in name or "actor died" in text.lower() or "died unexpectedly" in text:
        return f"{owner}'s process was lost (killed, or its node is gone)"
    # A traceback ends with the error, which may have indented hints below it.
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(" ")]
    cause = re.sub(r"^densenet_dist\.errors\.\w+: ", "", lines[-1]) if lines else name
    return re.sub(r"\s+", " ", cause)[:300]
