"""A run as Python sees it: its figures, its curves, its page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from densenet_dist.config import load_config
from densenet_dist.display.progress import counted
from densenet_dist.errors import StorageError
from densenet_dist.run_folder import CONFIG_FILE, PAGE_FILE, open_run
from densenet_dist.schema import Config

if TYPE_CHECKING:
    from densenet_dist.pages.picture import Picture


@dataclass(frozen=True, repr=False)
class Result:
    """A run, from `fit` or `load_run`; a notebook shows its figures as a table.

    Attributes:
        run: its folder, a path or URI, which `densenet_dist.evaluate` takes.
        summary: ``test/top1``, ``test/top5``, ``test/loss`` (shares and mean), the ``best`` epoch's validation
            figures, ``epochs``, ``global_step``, ``train_seconds``, ``status``; empty until the run has finished.

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
            StorageError, ConfigError: it cannot be read, or is wrong.
        """
        return load_config(open_run(self.run).fetch(CONFIG_FILE))

    @property
    def history(self) -> list[dict[str, Any]]:
        """A record an epoch, in order: ``epoch``, ``train/loss``, ``train/top1``, ``val/loss``, ``val/top1``, ``lr``,
        ``seconds`` and more, as metrics.jsonl has them; ``pandas.DataFrame(result.history)`` is a table.

        Raises:
            StorageError: they cannot be read.
        """
        return [record for record in open_run(self.run).read_records() if "train/loss" in record]

    @property
    def page(self) -> str:
        """Where the run's report.html is, a path or URI."""
        folder = self.run.partition("?")[0] if "://" in self.run else self.run
        return f"{folder}/{PAGE_FILE}"

    def plot(self) -> Picture:
        """Accuracy and loss of training and validation over the epochs, the test result as a star.

        Returns:
            A matplotlib figure, which a notebook shows; ``.savefig("curves.png")`` writes it to a file.

        Raises:
            StorageError: the run has no epochs yet, or they cannot be read.
        """
        from densenet_dist.report.figures import curves_figure

        folder = open_run(self.run)
        records = folder.read_records()
        epochs = [record for record in records if "train/loss" in record]
        if not epochs:
            raise StorageError(
                f"the run {self.run} has no epochs yet, and so nothing to plot\n  wait for the end of its first"
            )
        test = next((record for record in reversed(records) if "test/loss" in record), None)
        return curves_figure(epochs, test, folder.name)

    def plot_confusion(self, *overrides: str) -> Picture:
        """The confusion matrix of the best checkpoint on the test set.

        A run without stored test results (not finished, or of an older version) is evaluated for that.

        Args:
            overrides: changes to the run's configuration for the evaluation, such as ``data.root=...``.

        Returns:
            A matplotlib figure, as `plot` does.

        Raises:
            StorageError, CheckpointError, DataError, EnvironmentProblem: as their names say.
        """
        from densenet_dist.report.figures import titled_confusion
        from densenet_dist.train.evaluation import load_test_results

        results = load_test_results(open_run(self.run), overrides)
        return titled_confusion(results.confusion, results.class_names, open_run(self.run).name)

    def __repr__(self) -> str:
        rows = self._rows()
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())

    def _repr_html_(self) -> str:
        from densenet_dist.pages.render import escape

        cells = {name: escape(value) for name, value in self._rows().items()}
        if "page" in cells and not Path(_shown(self.page)).is_absolute() and "://" not in self.page:
            link = escape(quote(_shown(self.page)))  # the notebook lies where its process works
            cells["page"] = f'<a href="{link}" target="_blank">{cells["page"]}</a>'
        rows = (f"<tr><td>{name}</td><td>{text}</td></tr>" for name, text in cells.items())
        return f"<table>{''.join(rows)}</table>"

    def _rows(self) -> dict[str, str]:
        """What a person wants to know of the run, in words."""
        rows = {"run": _shown(self.run)}
        if not self.summary:
            return rows | {"status": "not finished: fit(config, resume=True) goes on with it"}
        best, seconds = self.summary["best"], self.summary["train_seconds"]
        rows["test"] = ", ".join(
            [
                f"top-1 {self.summary['test/top1']:.2%}",
                f"top-5 {self.summary['test/top5']:.2%}",
                f"loss {self.summary['test/loss']:.4f}",
            ]
        )
        if "val/top1" in best:
            rows["validation"] = f"top-1 {best['val/top1']:.2%} (best, epoch {best['epoch']})"
        epochs, steps = counted(self.summary["epochs"], "epoch"), counted(self.summary["global_step"], "step")
        rows["trained"] = f"{epochs}, {steps} in {seconds:,.0f} s"
        rows["status"] = str(self.summary["status"])
        rows["page"] = _shown(self.page)
        return rows


def load_run(run: str | Path) -> Result:
    """A run that was trained before, here or elsewhere, finished or not.

    Args:
        run: its folder (path or URI), or its name under ``runs/``.

    Raises:
        StorageError: there is no run, or it cannot be read.

    Examples:
        >>> load_run("quickstart").config.name
        'quickstart'
    """
    folder = open_run(run)
    return Result(folder.location, folder.read_summary())


def _shown(place: str) -> str:
    """A path as it is seen from here."""
    return os.path.relpath(place) if Path(place).is_relative_to(Path.cwd()) else place
