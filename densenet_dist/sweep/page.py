"""Write the page of a sweep: one HTML file that contains its pictures."""

from __future__ import annotations

from collections.abc import Sequence

from densenet_dist.pages.figures import STATUSES
from densenet_dist.pages.render import render
from densenet_dist.run_folder import RunFolder, join_location
from densenet_dist.sweep.console import short, shown
from densenet_dist.sweep.definition import Sweep
from densenet_dist.sweep.plots import draw_plots, is_number
from densenet_dist.sweep.results import BEST_FILE, PAGE_FILE, Trial, best_trial, ranked


def write_page(folder: RunFolder, sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Write sweep.html: the best trial, all trials as a table, plots, and the sweep's settings.

    Raises:
        StorageError: it cannot be written.
    """
    settings = sweep.settings
    best = best_trial(trials, settings.maximise)
    counts = {status: sum(trial.status == status for trial in trials) for status in STATUSES}
    has_tests = any("test/top1" in trial.figures for trial in trials)
    has_causes = any(trial.cause for trial in trials)
    page = render(
        "sweep.html",
        title=settings.name,
        trials=ranked(trials, settings.maximise),
        planned=max(sweep.trials, len(trials)),
        counts=[f"{count} {status}" for status, count in counts.items() if count],
        sweep=settings,
        best=best,
        best_settings=[f"{key} {shown(best.overrides.get(key))}" for key in sweep.space] if best else [],
        keys=list(sweep.space),
        show=shown,
        location=folder.location,
        best_file=join_location(folder.location, BEST_FILE),
        can_resume=bool(counts["interrupted"] or counts["running"] or len(trials) < sweep.trials),
        columns=_columns(sweep, has_tests, has_causes),
        has_tests=has_tests,
        has_causes=has_causes,
        plots=draw_plots(sweep, trials, best),
        settings=sweep.to_yaml(),
    )
    folder.write(PAGE_FILE, page)


def _columns(sweep: Sweep, has_tests: bool, has_causes: bool) -> list[tuple[str, bool]]:
    """Return the table's headings, each with whether its column holds numbers."""
    settings = sweep.settings
    return [
        ("trial", False),
        ("status", False),
        (f"{settings.metric} (%)" if settings.is_accuracy else settings.metric, True),
        ("best epoch", True),
        *((short(key), all(map(is_number, domain.ends))) for key, domain in sweep.space.items()),
        ("parameters", True),
        ("seconds", True),
        *[("test top-1 (%)", True)] * has_tests,
        *[("cause of failure", False)] * has_causes,
    ]
