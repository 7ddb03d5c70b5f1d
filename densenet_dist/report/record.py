"""Read a run from its folder: settings, machine, epochs, test results; the data set is not needed."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from densenet_dist.config import load_run_config
from densenet_dist.custom import is_allowed, is_custom
from densenet_dist.errors import StorageError
from densenet_dist.report.summary import ModelSummary, summarize
from densenet_dist.run_folder import CONFIG_FILE, ENV_FILE, RunFolder, open_run
from densenet_dist.schema import Config
from densenet_dist.train.checkpoint import best_record
from densenet_dist.train.inputs import read_metadata
from densenet_dist.train.results import TestResults, read_test_results


@dataclass(frozen=True, eq=False)
class RunRecord:
    """The contents of a run's files.

    Attributes:
        settings: config.yaml as text.
        environment: env.json; empty where it is missing.
        epochs: the records of complete epochs in order, at least one.
        test: the record of the test result; None before the test.
        summary: summary.json; empty until the run has finished.
        results: test_results.json; None until the run has finished or was evaluated.
        model: its layers, or as text why they are unknown.
    """

    folder: RunFolder
    config: Config
    settings: str
    environment: dict[str, Any]
    epochs: tuple[dict[str, Any], ...]
    test: dict[str, Any] | None
    summary: dict[str, Any]
    results: TestResults | None
    model: ModelSummary | str

    @property
    def name(self) -> str:
        """The folder's name, which is that of the run unless the folder was renamed."""
        return self.folder.name

    @property
    def best(self) -> dict[str, Any] | None:
        """The record of the epoch with the best monitored metric; None without validation."""
        return best_record(self.epochs, self.config.checkpoint.monitor)

    @property
    def commit(self) -> tuple[str, bool]:
        """The git commit, empty if unknown, and whether there were uncommitted changes."""
        revision, plus, _ = str(self.environment.get("git") or "").partition("+")
        return revision, bool(plus)


def read_run(run: str | Path | RunFolder, *, trust: bool = False) -> RunRecord:
    """Read a run's folder.

    Args:
        run: its path, URI, name under ``runs/``, or the folder itself.
        trust: import the custom model that the run names, for the table of its layers.

    Raises:
        StorageError: the run does not exist, has no complete epoch, or cannot be read.
        ConfigError: its config.yaml is wrong.
    """
    folder = run if isinstance(run, RunFolder) else open_run(run)
    records = folder.read_records()
    epochs = tuple(record for record in records if "train/loss" in record)
    if not epochs:
        raise StorageError(
            f"the run {folder.uri} has no epochs yet, so there is nothing to report\n"
            f"  wait for its first epoch, or resume it: densenet-dist train --resume {shlex.quote(folder.location)}"
        )
    path = folder.fetch(CONFIG_FILE)
    config = load_run_config(path, trust=trust)
    return RunRecord(
        folder=folder,
        config=config,
        settings=path.read_text(encoding="utf-8"),
        environment=folder.read_json(ENV_FILE),
        epochs=epochs,
        test=next((record for record in reversed(records) if "test/loss" in record), None),
        summary=folder.read_summary(),
        results=read_test_results(folder),
        model=_model(folder, config),
    )


def _model(folder: RunFolder, config: Config) -> ModelSummary | str:
    name = config.model.variant
    if is_custom(name) and not is_allowed(name):
        return f"{name} was not imported; --trust does so"
    try:
        return summarize(config, len(read_metadata(folder, config).names), config.data.resolved_image_size)
    except Exception as error:  # the rest of the report is needed all the same
        return f"{type(error).__name__}: {error}"
