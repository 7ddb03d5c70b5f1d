"""The settings that a resumed run may change."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from densenet_dist.config import load_run_config, to_dict, to_yaml
from densenet_dist.custom import trust_option
from densenet_dist.errors import ConfigError
from densenet_dist.run_folder import CONFIG_FILE, SUMMARY_FILE, RunFolder
from densenet_dist.schedules import OPEN_ENDED
from densenet_dist.schema import Config
from densenet_dist.yaml_settings import flatten

if TYPE_CHECKING:
    from densenet_dist.train.context import Event

_LIMITS = ("train.epochs", "train.max_minutes")
_RESUME_MAY_CHANGE = (
    *("cluster.", "fault.", "checkpoint.", "storage", "log.", "train.profile", "name"),
    *("data.root", "data.url", "data.download", "data.prefetch", "data.loader"),
)


def resume_config(run: RunFolder, overrides: list[str], *, trust: bool = False) -> Config:
    """Return the configuration of an existing run with changes that a resumed run may make.

    With `trust`, the custom parts that the run names may be imported.

    Raises:
        StorageError: the configuration cannot be read.
        ConfigError: an override changes a setting that must stay the same.
    """
    path = run.fetch(CONFIG_FILE)
    before, after = load_run_config(path, trust=trust), load_run_config(path, *overrides, trust=trust)
    # The folder may have been moved or mounted elsewhere since.
    after = replace(after, storage=run.storage, name=run.name)
    allowed, refused = _changes(before, after)
    if refused:
        fine = "\nit may change:\n  " + "\n  ".join(allowed) if allowed else ""
        remedy = "start a new run for that, with name=NEW"
        if any(key.startswith(_LIMITS) for key in refused):
            remedy = f"only {', '.join(OPEN_ENDED)} schedules can be extended, and none shortened; {_from_weights(run)}"
        raise ConfigError("a resumed run cannot change:\n  " + "\n  ".join(refused) + f"\n  {remedy}{fine}")
    _refuse_early_stop(run, before, after)
    return after


def _refuse_early_stop(run: RunFolder, before: Config, after: Config) -> None:
    if _extends(before, after) and run.read_summary().get("status") == "early stop":
        raise ConfigError(f"the run stopped early, so more epochs would change nothing\n  {_from_weights(run)}")


def _from_weights(run: RunFolder) -> str:
    command = f"densenet-dist train --from {shlex.quote(run.location)} name=NEW{trust_option()}"
    return f"start a new run from the weights: {command}"


def _extends(before: Config, after: Config) -> bool:
    old, new = ((each.train.epochs, each.train.max_minutes or math.inf) for each in (before, after))
    return before.train.schedule.name in OPEN_ENDED and old != new and old[0] <= new[0] and old[1] <= new[1]


def extend_config(run: RunFolder, config: Config) -> None:
    """Write the numbers of epochs and minutes to the run's config.yaml if the resumed run has more than before."""
    began = load_run_config(run.fetch(CONFIG_FILE))
    if _extends(began, config):
        train = replace(began.train, epochs=config.train.epochs, max_minutes=config.train.max_minutes)
        run.write(CONFIG_FILE, to_yaml(replace(began, train=train)))


def _changes(before: Config, after: Config) -> tuple[list[str], list[str]]:
    """Return descriptions of the allowed and of the refused changes."""
    # Older runs have data.stratified=false where null means the same now.
    old, new = (flatten(to_dict(each)) | {"data.stratified": each.data.is_stratified} for each in (before, after))
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    lines = {key: f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys}
    may_change = (*_RESUME_MAY_CHANGE, *(_LIMITS if _extends(before, after) else ()))
    refused = [lines[key] for key in keys if not key.startswith(may_change)]
    return [lines[key] for key in keys if key.startswith(may_change)], refused


def report_changes(run: RunFolder, config: Config, listener: Callable[[Event], None]) -> None:
    """Report the settings that differ from the run's config.yaml in a note."""
    began = load_run_config(run.fetch(CONFIG_FILE))
    allowed, refused = _changes(replace(began, storage=config.storage, name=config.name), config)
    if allowed or refused:
        text = "\n  ".join(["settings changed since the run began:", *allowed, *refused])
        listener({"kind": "note", "text": text, "warning": bool(refused)})


def is_finished(run: RunFolder, config: Config) -> bool:
    """Return whether the run finished with this configuration, except for settings that a resumed run may change."""
    if not run.exists(SUMMARY_FILE):
        return False
    began = load_run_config(run.fetch(CONFIG_FILE))
    _refuse_early_stop(run, began, config)
    return not _changes(began, config)[1] and not _extends(began, config)
