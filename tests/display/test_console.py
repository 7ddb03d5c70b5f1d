"""What a run says while it works: to somebody before a terminal, to a file, and to a program."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from densenet_dist.display.console import Console, epoch_parts
from densenet_dist.display.json_lines import RunJsonLines
from densenet_dist.errors import Interrupted
from densenet_dist.run_folder import RunFolder

START = {
    **{"kind": "start", "model": "notebook", "parameters": 3532210, "data": "cifar10", "train_images": 45000},
    **{"val_images": 5000, "epochs": 90, "steps_per_epoch": 704, "total_steps": 63360, "global_batch_size": 64},
    **{"max_minutes": None, "precision": "fp32"},
    **{"loader": "torch", "world_size": 2, "device": "CPU", "epoch": 0, "global_step": 0, "best": None},
}
PROGRESS = {
    **{"kind": "progress", "epoch": 8, "epochs": 90, "step": 200, "steps": 704, "global_step": 5128, "loss": 1.5},
    **{"top1": 0.625, "rate": 128.0, "goodput": 0.9, "total_steps": 63360},
}
EPOCH = {
    **{"kind": "epoch", "epoch": 7, "epochs": 90, "lr": 0.001, "train/loss": 1.23456, "train/top1": 0.5},
    **{"train/top5": 0.9, "val/loss": 2.0, "val/top1": 0.4321, "val/top5": 0.8, "perf/images_per_s": 1234.5},
    **{"seconds": 36.4, "many_classes": False, "is_best": True, "global_step": 4928, "total_steps": 63360},
}
SUMMARY = {
    **{"status": "finished", "epochs": 90, "global_step": 63360, "train_seconds": 3723.0, "test/images": 10_000},
    **{"best": {"epoch": 88, "val/top1": 0.9379}, "test/loss": 0.25, "test/top1": 0.931, "test/top5": 0.9987},
}
EVENTS = f"""
import os
from densenet_dist.display.console import Console
from densenet_dist.display.json_lines import RunJsonLines
start, progress, epoch = {START!r}, {PROGRESS!r}, {EPOCH!r}
"""
SCRIPT = f"{EVENTS}console = Console()\nconsole(start)\n"
JSON = f"{EVENTS}console = RunJsonLines()\nconsole.__enter__()\nos.system('echo a shell')\nconsole(start)\n"
ENV = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
ENV |= {"TERM": "xterm-256color"}
HIDE_CURSOR, SHOW_CURSOR, ERASE, ERASE_ABOVE = "\x1b[?25l", "\x1b[?25h", "\x1b[2K", "\x1b[1A\x1b[2K"
WATCHED = """
console({**progress, 'step': 72, 'global_step': 5000})
console(progress)
if console._progress.live.is_started: console._progress.refresh()  # as it does four times a second
os._exit(0)
"""


def shown(script: str, columns: int, **env: str) -> str:
    """All that a script writes to a terminal of that width, escape sequences included."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    command = [sys.executable, "-c", SCRIPT + script]
    process = subprocess.Popen(command, env=ENV | env, start_new_session=True, **streams)
    os.close(theirs)
    written = b""
    try:
        while piece := os.read(ours, 65536):
            written += piece
    except OSError:
        pass  # how Linux says that nobody holds the other end any more
    except BaseException:  # the test's time is over
        process.kill()
        raise
    finally:
        os.close(ours)
    text = written.decode()
    assert process.wait() == 0, text
    return text


def plain(text: str) -> list[str]:
    """The lines of a text, without colors."""
    return re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    """Of a finished run, without a report."""
    run = RunFolder(str(tmp_path / "a b"), "run")
    run.create()
    speed = {"perf/images_per_s": 1234.5, "goodput/ratio": 0.87}
    run.write("metrics.jsonl", json.dumps({"epoch": 1, "global_step": 9, **speed}) + "\n")
    return run


def test_a_file_gets_start_epochs_notes_and_the_ending(capsys, folder):
    folder.write("report.html", "")
    with Console() as console:
        console({"kind": "run", "name": "run", "run": "runs/run", "resumed": False})
        console({**START, "epoch": 6, "global_step": 4224})
        console({**PROGRESS, "global_step": 4424})
        console(EPOCH)
        console({"kind": "note", "text": "something [odd] happened", "warning": True})
        console({"kind": "end", **SUMMARY})
        console.finish(folder, SUMMARY)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "loss 1.5" not in out  # no live line where nobody looks
    lines = out.splitlines()
    assert lines.pop(0) == "run folder: runs/run"
    assert lines[0] == "notebook, 3,532,210 parameters; cifar10, 45,000 training and 5,000 validation images"
    assert lines[1] == "90 epochs of 704 steps, global batch size 64; 2 x CPU, fp32, loader torch"
    line = "epoch   7/90  train loss 1.2346 top-1 50.00%  val loss 2.0000 top-1 43.21%  lr 1.00e-03"
    line += "  1,234 images/s  36.4 s"
    assert lines[2] == "resumed after step 4224, in epoch 7"
    assert re.fullmatch(re.escape(line) + r"  [\d:]+ left  \*", lines[3])
    assert "  ".join(epoch_parts(EPOCH)) == f"{line}  *"
    assert "".join(epoch_parts({**EPOCH, "many_classes": True})).count("top-5") == 2
    assert lines[4] == "something [odd] happened"
    assert [re.split("   +", line.strip()) for line in lines[5:] if line.strip()] == [
        ["finished: run"],
        ["validation top-1  93.79%", "(best, epoch 88)"],
        ["test top-1", "93.10%", "(top-5 99.87%, loss 0.2500, 10,000 images)"],
        ["trained", "90 epochs, 63,360 steps in 1:02:03"],
        ["run folder", folder.uri],
        ["report", f"{folder.uri}/report.html"],
        ["evaluate", f"densenet-dist evaluate '{folder.uri}'"],
        ["rebuild report", f"densenet-dist report '{folder.uri}'"],
        ["TensorBoard", f"tensorboard --logdir '{folder.storage}'"],
    ]


def test_a_quiet_console_shows_warnings_only(capsys, folder):
    with Console(quiet=True) as console:
        console(START)
        console(EPOCH)
        console({"kind": "note", "text": "loader: torch"})
        console({"kind": "note", "text": "a worker was lost", "warning": True})
        console.finish(folder, SUMMARY)
    assert capsys.readouterr() == ("", "warning: a worker was lost\n")
    with Console() as console:
        console.mute()  # another rank
        console({"kind": "note", "text": "a worker was lost", "warning": True})
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("script", [SCRIPT, JSON], ids=["console", "json"])
def test_a_line_is_sent_at_once_and_a_run_outlives_its_reader(script):
    script += "console(epoch); input(); console(epoch); console(epoch); print('x'); os.write(2, b'to the end')"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", script], env=ENV, text=True, **pipes)
    assert process.stdin is not None
    assert process.stdout is not None
    while "7" not in (line := process.stdout.readline()) or "epoch" not in line:  # it waits for us
        assert line
        assert "a shell" not in line  # nothing else gets through to a program
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    process.stdin = process.stdout = None
    assert process.communicate()[1].endswith("to the end")
    assert process.returncode == 0


@pytest.mark.parametrize("columns", [100, 40])
def test_a_terminal_shows_bars_and_the_time_left(columns):
    text, frame = shown("console(epoch)\n" + WATCHED, columns).split("\r" + ERASE + ERASE_ABOVE * 2)
    epoch, run, metrics = plain(frame)
    assert HIDE_CURSOR in text
    assert max(len(epoch), len(run)) <= columns
    assert re.fullmatch(r"epoch 8/90 [━╸╺ ]+ 200/704 +0:00:0\d\s*", epoch)
    assert re.fullmatch(r"run +[━╸╺ ]+ 5128/633\S+ \d+:\d\d:\d\d\s*", run)
    assert metrics == "128 images/s  loss 1.500  top-1 62.50%"
    if columns == 40:
        lines = plain(text)
        first = next(number for number, line in enumerate(lines) if line.startswith("epoch   7/90"))
        assert lines[first + 1 : first + 3] == ["  train loss 1.2346 top-1 50.00%", "  val loss 2.0000 top-1 43.21%"]


def test_at_the_end_the_live_lines_are_gone(folder):
    script = "from densenet_dist.run_folder import RunFolder\nconsole(progress)\nconsole(epoch)\n"
    script += f"console.finish(RunFolder({folder.storage!r}, 'run'), {SUMMARY!r})\n"
    live, ending = shown(script, 80).split(SHOW_CURSOR)
    assert "200/704" in live
    assert ending.startswith("\r" + ERASE_ABOVE * 3)
    assert "200/704" not in ending
    assert "report.html" not in ending  # it could not be written


def test_a_dumb_terminal_gets_no_sequences():
    text = shown("console(epoch)\n" + WATCHED, 100, TERM="dumb")
    assert "\x1b" not in text
    assert "1,234 images/s" in text


def test_events_for_a_program(capsys, folder):
    with pytest.raises(Interrupted), RunJsonLines() as lines:  # noqa: PT012
        print("what a library says")
        lines({"kind": "run", "name": "run", "run": "runs/run", "resumed": False})
        lines(START)
        lines(PROGRESS)
        lines(PROGRESS)  # too soon
        lines({**EPOCH, "val/loss": float("nan")})
        lines({"kind": "note", "text": "\udcff is no letter", "warning": True})
        lines({"kind": "end", **SUMMARY})  # the last line comes later, when all is written
        lines.finish(folder, SUMMARY)
        raise Interrupted("runs/run")
    out, err = capsys.readouterr()
    assert err == "what a library says\n"
    assert "NaN" not in out
    found = [json.loads(line) for line in out.splitlines()]
    assert [line["event"] for line in found] == ["run", "start", "progress", "epoch", "note", "end", "error"]
    _, start, progress, epoch, note, end, error = found
    assert {**START, **start} == {**start, "kind": "start"}
    assert (progress["step"], progress["top1"], progress["rate"]) == (200, 0.625, 128)
    assert (epoch["val/loss"], epoch["val/top1"], epoch["is_best"]) == (None, 0.4321, True)
    assert (note["level"], note["text"]) == ("warning", "\udcff is no letter")
    assert (end["test/top1"], end["best"]["epoch"], end["images_per_s"], end["goodput"]) == (0.931, 88, 1234.5, 0.87)
    assert end["files"] == {"run_folder": folder.uri, "page": None}
    assert (error["type"], error["exit_code"]) == ("Interrupted", 130)
    assert "train --resume runs/run" in error["message"]
