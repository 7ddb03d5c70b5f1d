"""Starts a run or a sweep, or resumes it where it exists: for launchers that may start the same thing twice.

    python launch/start.py train CONFIG.yaml storage=PLACE name=NAME [key=value]...
    python launch/start.py tune SWEEP.yaml storage=PLACE name=NAME [key=value]...
    python launch/start.py finished storage=PLACE name=NAME

The last one exits with 0 if the run has finished, else with 1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from densenet_dist.errors import DenseNetDistError
from densenet_dist.run_folder import CONFIG_FILE, SUMMARY_FILE, RunFolder


def arguments(command: str, source: str, *settings: str) -> list[str]:
    """The arguments for `densenet-dist`."""
    folder, place = _folder(settings)
    if command == "train" and folder.exists(CONFIG_FILE):
        return ["train", "--resume", place, *settings]  # which refuses what would make it another run
    if command == "tune":
        from densenet_dist.sweep.results import SWEEP_FILE  # takes seconds, which `finished` need not wait

        if folder.exists(SWEEP_FILE):
            return ["tune", "--resume", place]
    return [command, source, *settings]


def finished(*settings: str) -> bool:
    """Whether the run has finished."""
    return _folder(settings)[0].exists(SUMMARY_FILE)


def _folder(settings: tuple[str, ...]) -> tuple[RunFolder, str]:
    given = dict(setting.split("=", 1) for setting in settings)
    if not {"storage", "name"} <= set(given):
        sys.exit(f"error: storage=PLACE and name=NAME must be given\n{__doc__}")
    base, question, query = given["storage"].partition("?")
    return RunFolder(given["storage"], given["name"]), f"{base.rstrip('/')}/{given['name']}{question}{query}"


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("train", "tune", "finished"):
        sys.exit(__doc__)
    try:
        if sys.argv[1] == "finished":
            sys.exit(not finished(*sys.argv[2:]))
        command = arguments(*sys.argv[1:])
    except DenseNetDistError as error:
        sys.exit(f"error: {error}")
    if file := os.environ.get("DRIVER_PID_FILE"):  # for launchers whose signals do not come here
        Path(file).write_text(f"{os.getpid()}\n")
    from densenet_dist.cli import main

    main(command)
