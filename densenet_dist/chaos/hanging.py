"""Workers that live but do not come forward."""

from __future__ import annotations

import os
import re
import signal
from typing import Final

from densenet_dist.chaos.case import case
from densenet_dist.chaos.lab import Lab, Observed, expect, finish, write_pictures

_GROUP: Final = "Hung"
_TIMEOUT_S: Final = 6
_SETTINGS: Final = ("cluster.workers=2", f"fault.hang_timeout_s={_TIMEOUT_S}", "train.epochs=8")


@case(
    _GROUP,
    f"SIGSTOP of one of two workers; fault.hang_timeout_s={_TIMEOUT_S}",
    "found within the timeout and 5 s, its rank and last step named; replaced; equal bit for bit",
)
def worker_frozen(lab: Lab) -> Observed:
    """It sends no signs of life."""
    run = lab.begin(*_SETTINGS)
    run.wait_for_step(25)
    lab.random.choice(run.workers()).send_signal(signal.SIGSTOP)
    seconds = run.wait_for("it is ended")
    (found,) = re.findall(r"rank \d on .* after step \d+", run.text)
    expect(seconds < _TIMEOUT_S + 5, f"found after {seconds:.1f} s only")
    finish(run, lab.undisturbed(*_SETTINGS))
    return Observed(
        f"after {seconds:.1f} s: {_without_host(found)}; equal", 1, {"seconds until a hang is found": [seconds]}
    )


@case(
    _GROUP,
    "pictures are read for ever, as on network storage that is gone; all other ranks wait in a collective call",
    "found within the timeout and 7 s, the place in the code named; once they are back, equal bit for bit",
)
def input_hangs(lab: Lab) -> Observed:
    """Named pipes in place of pictures: whoever opens one waits until somebody writes."""
    pictures = lab.folder / lab.name("pictures")
    write_pictures(pictures, ("one", "two"))
    settings = (
        *(*_SETTINGS, "data.name=folder", f"data.root={pictures}", "data.image_size=32", "data.limit=null"),
        *("train.global_batch_size=32", "train.epochs=6"),
    )
    like = lab.undisturbed(*settings)
    run = lab.begin(*settings)
    run.wait_for_step(4)
    victims = {path: path.read_bytes() for path in (pictures / "one").iterdir()}
    for path in victims:
        path.unlink()
        os.mkfifo(path)
    seconds = run.wait_for("it is ended")
    for path, content in victims.items():
        path.unlink()
        path.write_bytes(content)
    expect(seconds < _TIMEOUT_S + 7, f"found after {seconds:.1f} s only")
    (found, *_) = re.findall(r"rank \d on .* after step \d+", run.text)
    expect("stands still" in found and ".py:" in found, found)
    finish(run, like)
    return Observed(f"after {seconds:.1f} s: {_without_host(found)}; equal", 1, {})


def _without_host(found: str) -> str:
    return re.sub(r" on \S+", "", found)
