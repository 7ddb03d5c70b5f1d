"""What a run says while it works: to somebody before a terminal, to a file, and to a program."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import Screen, on_terminal

from densenet_dist.display.console import Console, epoch_line
from densenet_dist.display.ending import Ending
from densenet_dist.display.json_lines import RunJsonLines
from densenet_dist.display.progress_view import ProgressView, clock_time, packed
from densenet_dist.errors import Interrupted

START = {
    **{"kind": "start", "model": "notebook", "parameters": 3532210, "data": "cifar10", "train_images": 45000},
    **{"val_images": 5000, "epochs": 90, "steps_per_epoch": 704, "global_batch_size": 64, "precision": "fp32"},
    **{"loader": "torch", "world_size": 2, "device": "CPU", "epoch": 0, "global_step": 0, "best": None},
}
PROGRESS = {
    **{"kind": "progress", "epoch": 8, "epochs": 90, "step": 200, "steps": 704, "global_step": 5128, "loss": 1.5},
    **{"top1": 0.625, "rate": 128.0, "goodput": 0.9},
}
EPOCH = {
    **{"kind": "epoch", "epoch": 7, "epochs": 90, "lr": 0.001, "train/loss": 1.23456, "train/top1": 0.5},
    **{"train/top5": 0.9, "val/loss": 2.0, "val/top1": 0.4321, "val/top5": 0.8, "perf/images_per_s": 1234.5},
    **{"seconds": 36.4, "many_classes": False, "is_best": True, "global_step": 4928},
}
SUMMARY = {
    **{"status": "finished", "epochs": 90, "global_step": 63360, "train_seconds": 3723.0},
    **{"best": {"epoch": 88, "val/top1": 0.9379}, "test/loss": 0.25, "test/top1": 0.931, "test/top5": 0.9987},
}
ENDING = Ending("/a b/run", "/a b/run", SUMMARY, 1234.5, 0.87)
SCRIPT = f"""
import os
from densenet_dist.display.console import Console
start, progress, epoch = {START!r}, {PROGRESS!r}, {EPOCH!r}
console = Console()
console(start)
"""
ENV = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
ENV |= {"TERM": "xterm-256color"}
WATCHED = """
console({**progress, 'global_step': 5000})
console(progress)
if console._live: console._live.refresh()  # as it does four times a second
os._exit(0)
"""


def shown(script: str, columns: int, **env: str) -> str:
    code, text = on_terminal([sys.executable, "-c", SCRIPT + script], columns, env=ENV | env)
    assert code == 0, text
    return text


# Lines


def test_an_epoch_is_one_line():
    assert epoch_line(EPOCH) == (
        "epoch   7/90  train loss 1.2346 top-1 50.00%  val loss 2.0000 top-1 43.21%  "
        "lr 1.00e-03  1,234 images/s  36.4 s  *"
    )
    without = {key: value for key, value in EPOCH.items() if not key.startswith("val")} | {"is_best": False}
    assert "val" not in epoch_line(without)
    assert not epoch_line(without).endswith("*")
    assert "top-1 43.21% top-5 80.00%" in epoch_line({**EPOCH, "many_classes": True})


def test_a_file_gets_start_epochs_notes_and_the_ending(capsys):
    with Console() as console:
        console({"kind": "run", "name": "run", "run": "runs/run", "resumed": False})
        console(START)
        console({**PROGRESS, "global_step": 4424})
        console(EPOCH)
        console({"kind": "note", "text": "something [odd] happened", "warning": True})
        console({"kind": "end", **SUMMARY})
        console.finish(ENDING)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "loss 1.5" not in out  # no live line where nobody looks
    lines = out.splitlines()
    assert lines[0] == "notebook, 3,532,210 parameters; cifar10, 45,000 training and 5,000 validation images"
    assert lines[1] == "90 epochs of 704 steps, 64 images a step; 2 x CPU, fp32, batches by torch"
    assert re.fullmatch(re.escape(epoch_line(EPOCH)[:-1]) + r"[\d:]+ left  \*", lines[2])
    assert lines[3] == "something [odd] happened"
    assert [re.split("   +", line.strip()) for line in lines[4:] if line.strip()] == [
        ["finished: run"],
        ["validation top-1  93.79%", "(best, epoch 88)"],
        ["test top-1", "93.10%", "(top-5 99.87%)"],
        ["trained", "90 epochs, 63,360 steps in 1:02:03"],
        ["speed", "1,234 images/s"],
        ["goodput", "87% of the time went into steps"],
        ["run folder", "/a b/run"],
        ["page", "/a b/run/report.html"],
        ["curves", "/a b/run/curves.png"],
        ["test it again", "densenet-dist evaluate '/a b/run'"],
        ["page again", "densenet-dist report '/a b/run'"],
        ["TensorBoard", "tensorboard --logdir '/a b'"],
    ]


def test_the_console_says_where_a_run_goes_on(capsys):
    Console()({**START, "epoch": 3, "global_step": 2115})
    assert "resumed after step 2115, in epoch 4" in capsys.readouterr().out


def test_a_quiet_console_shows_warnings_only(capsys):
    with Console(quiet=True) as console:
        console(START)
        console(EPOCH)
        console({"kind": "note", "text": "batches are made by torch"})
        console({"kind": "note", "text": "a worker was lost", "warning": True})
        console.finish(ENDING)
    assert capsys.readouterr() == ("", "warning: a worker was lost\n")
    with Console(silent=True) as console:  # another rank
        console({"kind": "note", "text": "a worker was lost", "warning": True})
    assert capsys.readouterr() == ("", "")


def test_a_line_is_sent_at_once_and_a_run_outlives_its_reader():
    script = SCRIPT + "console(epoch); input(); console(epoch); console(epoch); print('x'); os.write(2, b'on')"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENV,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert [process.stdout.readline().split()[0] for _ in range(3)] == ["notebook,", "90", "epoch"]  # it waits for us
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    process.stdin = process.stdout = None
    assert process.communicate()[1] == "on"
    assert process.returncode == 0


# Terminals


def test_a_terminal_shows_bars_figures_and_the_best():
    screen = Screen(100).write(shown("console(epoch)\n" + WATCHED, 100))
    assert screen.hidden
    epoch, run, figures = screen.lines[-3:]
    assert re.fullmatch(r"epoch 8/90  [━╸╺ ]{40}  200/704  4:12 left\s*", epoch)
    assert re.fullmatch(r"run +[━╸╺ ]{40} +8 %  [\d:]+ left\s*", run)
    assert figures == "128 images/s  loss 1.500  top-1 62.50%  best 43.21% (epoch 7)"
    said = "\n".join(screen.lines)
    assert said.count("200/704") == 1  # drawn over, not below each other
    assert "val loss 2.0000 top-1 43.21%" in said


def test_a_narrow_terminal_gets_whole_words():
    screen = Screen(40).write(shown("console(epoch)\n" + WATCHED, 40))
    epoch, run, *figures = screen.lines[-4:]
    assert re.fullmatch(r"epoch 8/90  [━╸╺ ]{8}  200/704  4:12 left", epoch)
    assert re.fullmatch(r"run         [━╸╺ ]{8}      8 %  [\d:]+ left", run)
    assert figures == ["128 images/s  loss 1.500  top-1 62.50%", "best 43.21% (epoch 7)"]
    assert max(map(len, screen.lines)) <= 40
    first = next(number for number, line in enumerate(screen.lines) if line.startswith("epoch   7/90"))
    assert screen.lines[first + 1 : first + 3] == [
        "  train loss 1.2346 top-1 50.00%",
        "  val loss 2.0000 top-1 43.21%",
    ]


def test_a_long_note_is_broken_between_words_and_never_inside_a_path():
    path = "/a/folder/that/is/longer/than/any/line/of/this/terminal"
    note = f"the checkpoint in {path} was damaged, so that the one before it is used"
    lines = Screen(40).write(shown(f"console({{'kind': 'note', 'text': {note!r}}})", 40)).lines
    first = lines.index("the checkpoint in")
    assert lines[first + 1 : first + 5] == [path[:40], path[40:], "was damaged, so that the one before it", "is used"]


def test_where_there_is_no_room_for_bars_there_are_none():
    screen = Screen(32).write(shown(WATCHED, 32))
    assert screen.lines[-4] == "epoch 8/90  200/704  4:12 left"
    assert re.fullmatch(r"run  8 %  [\d:]+ left", screen.lines[-3])
    assert screen.lines[-2:] == ["128 images/s  loss 1.500", "top-1 62.50%"]


def test_the_live_lines_are_gone_at_the_end():
    script = "console({**progress, 'global_step': 4424}); console._live.refresh()\nwith console: console(epoch)\n"
    screen = Screen(120).write(shown(script, 120))
    assert not screen.hidden
    assert [line for line in screen.lines if line][-2].startswith("epoch   7/90")
    assert not any("200/704" in line for line in screen.lines)


def test_paths_are_links_on_a_terminal():
    script = "from densenet_dist.display.ending import Ending\n"
    web = "http://mlflow:5000/#/experiments/1/runs/2"
    script += f"console.finish(Ending('/a b/run', '/a b/run', {SUMMARY!r}, None, None, {{'MLflow': '{web}'}}))\n"
    links = Screen(80).write(shown(script, 80)).links
    assert links["/a b/run/report.html"] == "file:///a%20b/run/report.html"
    script = script.replace("/a b/run", "s3://bucket/runs/k")
    assert Screen(80).write(shown(script, 80)).links == {web: web}


@pytest.mark.parametrize(
    ("env", "colours", "moves"),
    [({}, True, True), ({"NO_COLOR": "1"}, False, True), ({"TERM": "dumb"}, False, False)],
    ids=["plain", "NO_COLOR", "dumb"],
)
def test_what_a_terminal_is_sent(env, colours, moves):
    text = shown("console(epoch)\n" + WATCHED, 100, **env)
    assert bool(re.search(r"\x1b\[(?:\d+;)*(?:3[0-9]|38;\S+)m", text)) is colours
    assert ("\x1b[1A" in text) is moves
    assert env.get("TERM") != "dumb" or "\x1b" not in text
    assert "1,234 images/s" in text


def test_forced_colours_in_a_file_do_not_move():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + "console(epoch)\n" + WATCHED],
        env=ENV | {"FORCE_COLOR": "1"},
        capture_output=True,
    )
    assert b"\x1b[32m*" in done.stdout
    assert b"\x1b[1A" not in done.stdout
    assert b"200/704" not in done.stdout


# Time left


def test_the_time_left_is_that_of_the_steps_so_far():
    now = 0.0
    view = ProgressView(clock=lambda: now)
    view.begin({**START, "epochs": 2, "steps_per_epoch": 100})
    assert view.run_left() is view.epoch_left() is None
    now = 50.0  # compiling
    view.moved({**PROGRESS, "step": 10, "steps": 100, "global_step": 10, "rate": 64.0})
    assert view.run_left() is None  # one look is no speed
    assert view.epoch_left() == 90  # 64 images a second are one step
    now = 60.0
    view.moved({**PROGRESS, "step": 20, "steps": 100, "global_step": 20, "rate": 64.0})
    assert view.run_left() == 180
    now = 185.0  # 80 steps, and 45 seconds of validation
    view.ended({**EPOCH, "global_step": 100})
    assert view.run_left() == 150
    view.begin({**START, "epochs": 2, "steps_per_epoch": 100, "global_step": 100})  # other workers, another speed
    assert view.run_left() is None


def test_a_resumed_run_knows_its_best():
    view = ProgressView()
    view.begin({**START, "best": {"epoch": 3, "val/top1": 0.5}})
    view.moved(PROGRESS)
    assert "best 50.00% (epoch 3)" in view._figures()


def test_times_and_lines():
    assert [clock_time(seconds) for seconds in (0.4, 59.6, 3599, 3600, 183845)] == [
        *("0:00", "1:00", "59:59", "1:00:00", "2 d 3:04:05"),
    ]
    assert packed(["aa", "bb", "cc"], 6, indent=" ") == ["aa  bb", " cc"]
    assert packed(["longer than it is wide", "b"], 6) == ["longer than it is wide", "b"]


# Programs


def test_events_for_a_program(capsys):
    with pytest.raises(Interrupted), RunJsonLines() as lines:  # noqa: PT012
        print("what a library says")
        lines({"kind": "run", "name": "run", "run": "runs/run", "resumed": False})
        lines(START)
        lines(PROGRESS)
        lines(PROGRESS)  # too soon
        lines({**EPOCH, "val/loss": float("nan")})
        lines({"kind": "note", "text": "\udcff is no letter", "warning": True})
        lines({"kind": "end", **SUMMARY})  # the last line comes later, when all is written
        lines.finish(ENDING)
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
    assert (end["test/top1"], end["best"]["epoch"], end["files"]["page"]) == (0.931, 88, "/a b/run/report.html")
    assert (error["type"], error["exit_code"]) == ("Interrupted", 130)
    assert "train --resume runs/run" in error["message"]
    known = (Path(__file__).parents[2] / "docs" / "console.md").read_text()
    assert [key for line in found for key in line if f"`{key}`" not in known] == []


def test_nothing_else_gets_through_to_a_program():
    script = (
        "import os, sys\nfrom densenet_dist.display.json_lines import RunJsonLines\n"
        "with RunJsonLines() as lines:\n"
        "    os.write(1, b'in C\\n'); print('in Python', flush=True); os.system('echo in a shell')\n"
        "    lines({'kind': 'note', 'text': 'ours'})\n"
        "print('after')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=ENV, capture_output=True, text=True, check=True)
    line, after = done.stdout.splitlines()
    assert json.loads(line)["text"] == "ours"
    assert after == "after"
    assert done.stderr.splitlines() == ["in C", "in Python", "in a shell"]


def test_a_run_goes_on_when_no_program_reads_any_more():
    script = (
        "import os, sys\nfrom densenet_dist.display.json_lines import RunJsonLines\n"
        "with RunJsonLines() as lines:\n"
        "    lines({'kind': 'note', 'text': 'first'}); input()\n"
        "    for _ in range(3): lines({'kind': 'note', 'text': 'second'})\n"
        "os.write(2, b'to the end')\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", script], env=ENV, text=True, **pipes)
    assert process.stdin is not None
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["text"] == "first"  # sent at once
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    process.stdin = process.stdout = None
    assert process.communicate()[1] == "to the end"
    assert process.returncode == 0
