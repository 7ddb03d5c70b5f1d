"""Workers that live but make no progress."""

import fcntl
import re
import signal
from contextlib import ExitStack, suppress

import pytest
from chaos_lab import Lab, Started, write_pictures

SETTINGS = ("cluster.workers=2", "fault.hang_timeout_s=6", "train.epochs=8")


def problem_of(run: Started) -> str:
    """The first rank in a warning, its last step and the problem."""
    return " ".join(re.search(r"(rank \d) on \S+, (after step \d+, .*?)[,;]", run.text).groups())


@pytest.mark.fault(
    "SIGSTOP of one of two workers, fault.hang_timeout_s=6",
    "replaced within the timeout and 5 s, naming its rank and last step; equal",
)
def test_worker_frozen(lab: Lab) -> None:
    run = lab.begin(*SETTINGS)
    run.wait_for_step(25)
    lab.random.choice(run.workers()).send_signal(signal.SIGSTOP)
    seconds = run.wait_for("did not respond for")
    found = problem_of(run)
    assert seconds < 11, f"found after {seconds:.1f} s only"
    run.finish_like(lab.undisturbed(*SETTINGS))
    lab.observe(f"after {seconds:.1f} s: {found}; equal")


@pytest.mark.fault(
    "one rank reads images for ever, as from lost network storage; the others wait in a collective call",
    "found within the timeout and 7 s, naming the place in the code; resumes once the storage is back; equal",
)
def test_input_hangs(lab: Lab) -> None:
    pictures = lab.folder / "pictures"
    settings = (*SETTINGS, *write_pictures(pictures, "one", "two"), "train.global_batch_size=32", "train.epochs=6")
    reference = lab.undisturbed(*settings)
    run = lab.begin(*settings)
    run.wait_for_step(4)
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # tells the holder of a lease that somebody waits
    with ExitStack() as leases:  # whoever opens a file waits until the lease on it ends, for 45 s at most
        for path in (pictures / "one").iterdir():
            file = leases.enter_context(open(path, "rb"))
            with suppress(BlockingIOError):  # it is being read
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        seconds = run.wait_for("made no progress for")
    assert seconds < 13, f"found after {seconds:.1f} s only"
    found = problem_of(run)
    assert re.search(r"made no progress .*\.py:", found), found
    run.finish_like(reference)
    lab.observe(f"after {seconds:.1f} s: {found}; equal")
