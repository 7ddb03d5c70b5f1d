"""The results of a run in Python: `Result` and `load_run`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from densenet_dist.config import load_run_config
from densenet_dist.display.progress import pluralize, test_details, trained_epochs
from densenet_dist.errors import StorageError
from densenet_dist.run_folder import CONFIG_FILE, PAGE_FILE, open_run
from densenet_dist.schema import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Result:
    """A run, from `fit` or `load_run`; a notebook shows its results as a table.

    Attributes:
        run: path or URI of the run folder, also for `densenet_dist.evaluate`.
        summary: ``test/top1`` (from 0 to 1), ``test/loss`` (mean), ``test/images``, the validation results of the
            ``best`` epoch, ``epochs``, ``global_step``, ``train_seconds``, ``status``; empty before the end of the run.

    Examples:
        >>> result = load_run("runs/quickstart")
        >>> result.summary["status"]
        'finished'
        >>> best = max(result.history, key=lambda record: record["val/top1"])
        >>> best["epoch"] == result.summary["best"]["epoch"]
        True
        >>> result.plot().savefig("curves.png")
    """

    run: str
    summary: Mapping[str, Any]

    @property
    def config(self) -> Config:
        """The run's configuration; ``load_config(result.config, "train.lr=0.1", "name=other")`` changes it.

        Raises:
            StorageError, ConfigError: config.yaml cannot be read, or is invalid.
        """
        return load_run_config(open_run(self.run).fetch(CONFIG_FILE))

    @property
    def history(self) -> list[dict[str, Any]]:
        """One record per epoch from metrics.jsonl: ``epoch``, ``train/loss``, ``train/top1``, ``val/loss``,
        ``val/top1``, ``lr``, ``seconds`` and more; ``pandas.DataFrame(result.history)`` makes a table.

        Raises:
            StorageError: metrics.jsonl cannot be read.
        """
        return [record for record in open_run(self.run).read_records() if "train/loss" in record]

    @property
    def page(self) -> str:
        """Path or URI of the run's report.html."""
        folder = self.run.partition("?")[0] if "://" in self.run else self.run
        return f"{folder}/{PAGE_FILE}"

    def plot(self) -> Figure:
        """Plot accuracy and loss of training and validation by epoch, and the test result as a star.

        Returns:
            A matplotlib figure, which a notebook shows; ``.savefig("curves.png")`` writes it to a file.

        Raises:
            StorageError: the run has no complete epoch, or its records cannot be read.
        """
        from densenet_dist.report.figures import curves_figure

        folder = open_run(self.run)
        records = folder.read_records()
        epochs = [record for record in records if "train/loss" in record]
        if not epochs:
            raise StorageError(f"the run {self.run} has no complete epoch to plot\n  wait until the first one ends")
        test = next((record for record in reversed(records) if "test/loss" in record), None)
        return curves_figure(epochs, test, folder.name)

    def plot_confusion(self) -> Figure:
        """Plot the confusion matrix of the best checkpoint on the test set.

        Raises:
            StorageError: the run has no stored test results, or cannot be read.
        """
        from densenet_dist.report.figures import titled_confusion
        from densenet_dist.train.results import read_test_results

        folder = open_run(self.run)
        results = read_test_results(folder)
        if results is None:
            raise StorageError(
                f"the run {folder.uri} has no test results yet\n"
                f"  evaluate it first: densenet_dist.evaluate({self.run!r})"
            )
        return titled_confusion(results.confusion, results.class_names, folder.name)

    def __repr__(self) -> str:
        rows = self._rows()
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())

    def _repr_html_(self) -> str:
        from densenet_dist.pages import escape

        cells = {name: escape(value) for name, value in self._rows().items()}
        if "page" in cells and not Path(_relative_path(self.page)).is_absolute() and "://" not in self.page:
            link = escape(quote(_relative_path(self.page)))  # relative to the folder of the notebook
            cells["page"] = f'<a href="{link}" target="_blank">{cells["page"]}</a>'
        rows = (f"<tr><td>{name}</td><td>{text}</td></tr>" for name, text in cells.items())
        return f"<table>{''.join(rows)}</table>"

    def _rows(self) -> dict[str, str]:
        rows = {"run": _relative_path(self.run)}
        if not self.summary:
            return rows | {"status": "not finished; resume with fit(config, resume=True)"}
        best, seconds = self.summary["best"], self.summary["train_seconds"]
        rows["test"] = f"top-1 {self.summary['test/top1']:.2%}, {test_details(self.summary)}"
        if "val/top1" in best:
            rows["validation"] = f"top-1 {best['val/top1']:.2%} (best, epoch {best['epoch']})"
        epochs, steps = trained_epochs(self.summary), pluralize(self.summary["global_step"], "step")
        rows["trained"] = f"{epochs}, {steps} in {seconds:,.0f} s"
        rows["status"] = str(self.summary["status"])
        rows["page"] = _relative_path(self.page)
        return rows


def load_run(run: str | Path, *, trust: bool = False) -> Result:
    """Load the results of a run, finished or not.

    Args:
        run: path or URI of the run folder, or the run's name under ``runs/``.
        trust: allow the custom parts that the run names to be imported later, which runs their code.

    Raises:
        StorageError: there is no such run, or it cannot be read.

    Examples:
        >>> load_run("quickstart").config.name
        'quickstart'
    """
    folder = open_run(run)
    if trust:
        load_run_config(folder.fetch(CONFIG_FILE), trust=True)
    return Result(folder.location, folder.read_summary())


def _relative_path(place: str) -> str:
    """Return a path relative to the working directory, if it is inside."""
    return os.path.relpath(place) if Path(place).is_relative_to(Path.cwd()) else place
