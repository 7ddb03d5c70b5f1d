"""A run at Weights & Biases or in its offline files; it reads WANDB_API_KEY, WANDB_MODE and WANDB_BASE_URL."""

from __future__ import annotations

import os
import uuid
from typing import Any, Final

from densenet_dist.run_folder import RunFolder
from densenet_dist.schema import Config
from densenet_dist.trackers.tracker import Record, Status, settings_of, sweep_of

_SETTINGS: Final[dict[str, Any]] = {
    # Send only metrics and settings: no console output, code, git state, packages, command line or machine details.
    **{"console": "off", "disable_code": True, "disable_git": True, "x_save_requirements": False},
    **{"x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True},
    **{"silent": True, "init_timeout": 20, "finish_timeout": 20, "reinit": "create_new"},
}


class WandbSession:
    """See `densenet_dist.trackers.tracker.Session`."""

    def __init__(self, config: Config, run: RunFolder, known: str | None) -> None:
        import wandb

        offline = _is_offline()
        require_key()
        sweep, log = sweep_of(config, run), config.log.wandb
        self._folder, self.is_new = run if run.is_remote else None, known is None
        self._run = wandb.init(
            project=log.project,
            entity=log.entity,
            group=sweep,
            job_type="trial" if sweep else None,
            name=config.name,
            id=known or uuid.uuid4().hex[:12],
            resume=None if offline else "allow",  # offline the same id is enough
            dir=str(run.path),
            config=settings_of(config),
            settings=wandb.Settings(**_SETTINGS),
        )
        self.id, self.url = str(self._run.id), None if offline else self._run.url
        self._run.define_metric("global_step")
        self._run.define_metric("*", step_metric="global_step")

    def send(self, record: Record) -> None:
        """Send a record at its global step."""
        self._run.log({key: value for key, value in record.items() if key != "time"})

    def end(self, status: Status, summary: Record) -> None:
        """Write the summary and wait until everything is sent."""
        best = {f"best/{key}": value for key, value in (summary.get("best") or {}).items()}
        self._run.summary.update({key: value for key, value in summary.items() if key != "best"} | best)
        self._run.finish(exit_code=1 if status == "failed" else 0)
        if self._folder is not None:
            self._folder.publish("wandb")


def require_key() -> None:
    """Check that there is a key if one is needed; W&B would prompt for it on the terminal.

    Raises:
        PermissionError: there is none.
    """
    if _is_offline():
        return
    import requests

    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not (os.environ.get("WANDB_API_KEY") or requests.utils.get_netrc_auth(address)):
        raise PermissionError(
            f"no key for {address}: set WANDB_API_KEY or run 'wandb login', or set WANDB_MODE=offline"
        )


def _is_offline() -> bool:
    return os.environ.get("WANDB_MODE", "online") != "online"
