"""The settings that a resumed run may change."""

from __future__ import annotations

import math
import shlex
from dataclasses import replace

from densenet_dist.config import load_run_config, to_dict, to_yaml
from densenet_dist.custom import trust_option
from densenet_dist.errors import ConfigError
from densenet_dist.run_folder import CONFIG_FILE, SUMMARY_FILE, RunFolder
from densenet_dist.schedules import OPEN_ENDED
from densenet_dist.schema import Config
from densenet_dist.yaml_settings import flatten

_LIMITS = ("train.epochs", "train.max_minutes")
_RESUME_MAY_CHANGE = (
    *("cluster.", "fault.", "checkpoint.", "log.", "train.profile"),
    *("data.root", "data.url", "data.download", "data.prefetch", "data.loader"),
)


def resume_config(run: RunFolder, overrides: list[str], *, trust: bool = False) -> Config:
    """Return the configuration of an existing run with changes, which `check_changes` allows or refuses.

    With `trust`, the custom parts that the run names may be imported.

    Raises:
        StorageError: the configuration cannot be read.
        ConfigError: an override is wrong, or names another folder.
    """
    path = run.fetch(CONFIG_FILE)
    before, after = load_run_config(path, trust=trust), load_run_config(path, *overrides, trust=trust)
    changed = (after.storage, after.name) != (before.storage, before.name)
    if changed and RunFolder(after.storage, after.name).location != run.location:
        raise ConfigError(
            f"storage, name: a resumed run stays in its folder, {run.uri}\n"
            "  to continue it elsewhere, move the folder and resume it there"
        )
    return replace(after, storage=run.storage, name=run.name)  # the folder may have been moved


def check_changes(run: RunFolder, config: Config) -> list[str]:
    """Return descriptions of the settings that differ from those of an existing run.

    Raises:
        StorageError: the run cannot be read.
        ConfigError: a resumed run cannot change one of them.
    """
    began = replace(load_run_config(run.fetch(CONFIG_FILE)), storage=config.storage, name=config.name)
    # Older runs have data.stratified=false where null means the same now.
    old, new = (flatten(to_dict(each)) | {"data.stratified": each.data.is_stratified} for each in (began, config))
    lines = {
        key: f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    }
    extended = _extends(began, config)
    may_change = (*_RESUME_MAY_CHANGE, *(_LIMITS if extended else ()))
    allowed = [line for key, line in lines.items() if key.startswith(may_change)]
    refused = [line for key, line in lines.items() if not key.startswith(may_change)]
    if refused:
        permitted = "\nit may change:\n  " + "\n  ".join(allowed) if allowed else ""
        remedy = "start a new run for that, with name=NEW"
        if any(line.startswith(_LIMITS) for line in refused):
            schedules = ", ".join(OPEN_ENDED)
            remedy = f"only runs with schedule {schedules} can be extended, and none shortened; {_from_weights(run)}"
        raise ConfigError("a resumed run cannot change:\n  " + "\n  ".join(refused) + f"\n  {remedy}{permitted}")
    if extended and run.read_summary().get("status") == "early stop":
        raise ConfigError(f"the run stopped early, so more epochs would change nothing\n  {_from_weights(run)}")
    return allowed


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


def is_finished(run: RunFolder, config: Config) -> bool:
    """Return whether the run finished, and `config` does not extend it."""
    return run.exists(SUMMARY_FILE) and not _extends(load_run_config(run.fetch(CONFIG_FILE)), config)
