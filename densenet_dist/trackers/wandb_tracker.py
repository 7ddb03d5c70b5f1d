"""A run at Weights & Biases or in its offline files; it reads WANDB_API_KEY, WANDB_MODE and WANDB_BASE_URL."""

from __future__ import annotations

import os
import uuid
from typing import Any, Final

from densenet_dist.trackers.tracker import WANDB, Record, Status, Tracker, flat_settings, sweep_of

_SETTINGS: Final[dict[str, Any]] = {
    # Send only metrics and settings: no console output, code, git state, packages, command line or machine details.
    **{"console": "off", "disable_code": True, "disable_git": True, "x_save_requirements": False},
    **{"x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True},
    **{"silent": True, "init_timeout": 20, "finish_timeout": 20, "reinit": "create_new"},
}


class WandbTracker(Tracker):
    """See `densenet_dist.trackers.tracker.Tracker`."""

    name = WANDB

    def connect(self, run_id: str | None) -> tuple[str, str | None]:
        """Start or resume the run."""
        import wandb

        require_key()
        sweep, log = sweep_of(self.config, self.run), self.config.log.wandb
        self._session = wandb.init(
            project=log.project,
            entity=log.entity,
            group=sweep,
            job_type="trial" if sweep else None,
            name=self.config.name,
            id=run_id or uuid.uuid4().hex[:12],
            resume=None if _is_offline() else "allow",  # offline the same id is enough
            dir=str(self.run.path),
            config=flat_settings(self.config),
            settings=wandb.Settings(**_SETTINGS),
        )
        self._session.define_metric("global_step")
        self._session.define_metric("*", step_metric="global_step")
        return str(self._session.id), None if _is_offline() else self._session.url

    def send(self, record: Record) -> None:
        """Send a record at its global step."""
        self._session.log({key: value for key, value in record.items() if key != "time"})

    def end(self, status: Status, summary: Record) -> None:
        """Write the summary and wait until everything is sent."""
        best = {f"best/{key}": value for key, value in (summary.get("best") or {}).items()}
        self._session.summary.update({key: value for key, value in summary.items() if key != "best"} | best)
        self._session.finish(exit_code=1 if status == "failed" else 0)
        self.run.publish("wandb")


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
