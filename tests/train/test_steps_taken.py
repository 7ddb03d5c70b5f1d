"""What a loss cost, to the step."""

import os
from pathlib import Path

import pytest
from distributed import start_process

from densenet_dist.run_folder import RunFolder
from densenet_dist.train.steps_taken import STEPS_FILE, StepsTaken


def run_in(folder: Path) -> RunFolder:
    run = RunFolder(str(folder), "run")
    run.create()
    return run


def take_steps_and_die(storage: str, begin: int, end: int) -> None:
    taken = StepsTaken(RunFolder(storage, "run"))
    taken.begin_at(begin)
    for step in range(begin + 1, end + 1):
        taken.reached(step)
    os.kill(os.getpid(), 9)


def test_steps_of_killed_processes_are_counted(tmp_path):
    run_in(tmp_path)
    for begin, end in ((0, 37), (20, 41), (20, 25)):
        process = start_process(take_steps_and_die, str(tmp_path), begin, end)
        process.join()
        assert process.exitcode == -9
    taken = StepsTaken(RunFolder(str(tmp_path), "run"))
    assert taken.begin_at(20) == 5
    assert taken.again == 17 + 21 + 5
    taken.close()
    assert StepsTaken(RunFolder(str(tmp_path), "run")).again == 43  # once only


def test_a_run_that_lost_nothing_takes_none_again(tmp_path):
    taken = StepsTaken(run_in(tmp_path))
    assert taken.begin_at(0) == 0
    taken.reached(8)
    taken.close()
    again = StepsTaken(RunFolder(str(tmp_path), "run"))
    assert again.begin_at(8) == 0
    assert again.begin_at(10) == 0  # weights of another run, further on
    assert again.again == 0


@pytest.mark.parametrize("content", ["", "7", "a b\n", "1 2 3\n", "\0" * 26])
def test_a_file_that_says_nothing_is_begun_anew(tmp_path, content):
    run = run_in(tmp_path)
    (run.path / STEPS_FILE).write_text(content)
    taken = StepsTaken(run)
    assert taken.begin_at(0) == 0
    taken.reached(5)
    taken.close()
    assert StepsTaken(run).begin_at(3) == 2


def test_where_it_cannot_be_written_nothing_is_known(tmp_path):
    run = run_in(tmp_path)
    (run.path / STEPS_FILE).mkdir()
    taken = StepsTaken(run)
    taken.reached(4)
    assert taken.begin_at(3) == 1  # within the process it is
    taken.close()
