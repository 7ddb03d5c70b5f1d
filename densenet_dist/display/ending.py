"""How a run ended: the same for the console, for programs, and for a run that had ended long before."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from densenet_dist.display.progress_view import clock_time
from densenet_dist.run_folder import PAGE_FILE, RunFolder


@dataclass(frozen=True)
class Ending:
    """A finished run.

    Attributes:
        run: its folder, a path or URI without a query.
        location: the same as commands take it.
        summary: what summary.json holds.
        images_per_s: while training, the median of its epochs; None where none is on record.
        goodput: the share of its time that went into steps that count, in [0, 1]; None where none is on record.
        links: addresses of the run at W&B and MLflow, by service.
    """

    run: str
    location: str
    summary: Mapping[str, Any]
    images_per_s: float | None
    goodput: float | None
    links: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: RunFolder, summary: Mapping[str, Any]) -> Ending:
        """The ending of a run that lies there."""
        from densenet_dist.trackers.tracker import links

        records = folder.read_records()
        rates = [line["perf/images_per_s"] for line in records if "perf/images_per_s" in line]
        shares = [line["goodput/ratio"] for line in records if "goodput/ratio" in line]
        speed, share = median(rates) if rates else None, shares[-1] if shares else None
        return cls(folder.uri, folder.location, summary, speed, share, links(folder))

    @property
    def title(self) -> str:
        """How it ended, and its name."""
        return f"{self.summary['status']}: {self.run.rpartition('/')[2]}"

    def figures(self) -> dict[str, str]:
        """What it came to."""
        summary, best = self.summary, self.summary["best"]
        found = {}
        if "val/top1" in best:
            found["validation top-1"] = f"{best['val/top1']:.2%}   (best, epoch {best['epoch']})"
        found["test top-1"] = f"{summary['test/top1']:.2%}   (top-5 {summary['test/top5']:.2%})"
        time = clock_time(summary["train_seconds"])
        epochs = f"{summary['epochs']} epoch{'s' * (summary['epochs'] != 1)}"
        found["trained"] = f"{epochs}, {summary['global_step']:,} steps in {time}"
        if self.images_per_s is not None:
            found["speed"] = f"{self.images_per_s:,.0f} images/s"
        if self.goodput is not None:
            found["goodput"] = f"{self.goodput:.0%} of the time went into steps"
        return found

    def files(self) -> dict[str, str]:
        """Where to look."""
        return {"run folder": self.run, "page": f"{self.run}/{PAGE_FILE}", "curves": f"{self.run}/curves.png"}

    def commands(self) -> dict[str, str]:
        """What to do next."""
        run = shlex.quote(self.location)
        return {
            "test it again": f"densenet-dist evaluate {run}",
            "page again": f"densenet-dist report {run}",
            "TensorBoard": f"tensorboard --logdir {shlex.quote(self.run.rpartition('/')[0])}",
        }
