"""``densenet-dist chaos``: faults, injected and judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from densenet_dist.cli.options import Debug, require_writable, write_json
from densenet_dist.errors import ConfigError, TrainingError


def chaos(
    cases: Annotated[
        list[str] | None, typer.Argument(metavar="[CASE]...", help="Names of cases, or what they begin with; else all.")
    ] = None,
    list_them: Annotated[bool, typer.Option("--list", help="Show the cases and what is expected of each.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Results as JSON; those of cases not run now are kept there.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page, Markdown, of all that --out has.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is chosen by chance.")] = 0,
    keep: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep all runs there, a new folder.")] = None,
    debug: Debug = False,
) -> None:
    """Train under injected faults, and judge whether anything is lost: kills, hangs, torn files, hostile input.

    densenet-dist chaos worker-killed weights-flipped

    All of them take half an hour on two cores. Exit code 1 where one does not come out as expected.
    """
    from densenet_dist.chaos.page import page_of
    from densenet_dist.chaos.running import Outcome, choose, merged, run_cases

    chosen = choose(cases or [])
    if list_them:
        for case in chosen:
            typer.echo(f"{case.name:36} {case.fault}\n{'':36} -> {case.expected}")
        return
    before = _results(out)
    require_writable(page)
    require_writable(out)

    def tell(outcome: Outcome) -> None:
        typer.echo(f"{outcome.status:10}  {outcome.case.name}  ({outcome.seconds:.0f} s)  {outcome.observed.text}")

    outcomes = run_cases(chosen, seed, tell, keep)
    everything = merged(before, outcomes)
    write_json({"seed": seed, "cases": [outcome.to_dict() for outcome in everything]}, out)
    if page is not None:
        page.write_text(page_of(everything, seed))
    wrong = [outcome.case.name for outcome in outcomes if outcome.status == "unexpected"]
    if wrong:
        raise TrainingError(f"{len(wrong)} of {len(outcomes)} cases did not come out as expected: {', '.join(wrong)}")


def _results(path: Path | None) -> list[dict[str, Any]]:
    """What an earlier call has written there."""
    if path is None or not path.exists():
        return []
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text())["cases"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} does not hold results of this command: {error}\n  give --out another name"
        ) from error
    return found
