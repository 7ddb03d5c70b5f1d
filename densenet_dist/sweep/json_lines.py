"""Events of a sweep as JSON lines on standard output (docs/commands.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from densenet_dist.display.json_lines import JsonLines, with_underscores
from densenet_dist.sweep.definition import Sweep
from densenet_dist.sweep.results import SweepResult, Trial, ranked

if TYPE_CHECKING:  # it imports torch
    from densenet_dist.train.context import Event


class SweepJsonLines(JsonLines):
    """Write the events of a sweep; see `densenet_dist.cluster.sweep`."""

    def __call__(self, event: Event) -> None:
        """Write one event."""
        if event["kind"] == "sweep":
            self._begin(event["sweep"], event["trials"], event["folder"])
        elif event["kind"] == "trial":
            best: Trial | None = event["best"]
            self.emit(
                "trial",
                **described(event["trial"]),
                state=event["state"],
                is_best=best is event["trial"],
                ended=sum(trial.status not in ("running", "interrupted") for trial in event["all"]),
            )
        elif event["kind"] == "note":
            self.note(event)

    def finish(self, result: SweepResult) -> None:
        """Write the last line of a sweep that ended."""
        settings = result.sweep.settings
        self.emit(
            "end",
            status=result.status,
            name=settings.name,
            metric=settings.metric,
            best=None if result.best is None else described(result.best),
            trials=[described(trial) for trial in ranked(result.trials, settings.maximise)],
            files=with_underscores(result.files()),
        )

    def _begin(self, sweep: Sweep, recorded: Sequence[Trial], folder: str) -> None:
        settings = sweep.settings
        self.emit(
            "sweep",
            name=settings.name,
            folder=folder,
            trials=max(sweep.trials, len(recorded)),
            recorded=len(recorded),
            metric=settings.metric,
            maximise=settings.maximise,
            search=settings.search.name,
            scheduler=settings.scheduler.name,
            space={key: domain.describe() for key, domain in sweep.space.items()},
        )


def described(trial: Trial) -> dict[str, Any]:
    """Convert a trial to plain values."""
    return {
        "name": trial.name,
        "status": trial.status,
        "settings": trial.overrides,
        "epochs": trial.epochs,
        "value": trial.metric,
        "best_epoch": trial.best_epoch,
        "cause": trial.cause,
    }
