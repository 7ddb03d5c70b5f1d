"""The cluster that is used: one that runs, or one of this process' own."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from densenet_dist.cluster.signals import handled_by
from densenet_dist.errors import EnvironmentProblem
from densenet_dist.schema import ClusterConfig, Config

# Spinning OpenMP threads of two workers on shared cores slow each other down thirtyfold.
WORKER_ENV = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}
# report() waits for the controller's next poll, 2 s by default; a dead worker is noticed at the same pace.
# Ray would nice workers to 15.
DRIVER_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_worker_niceness": "0",
    # Said in our own words when the workers start again.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^A worker died or was killed",
}


@contextmanager
def connected(config: ClusterConfig) -> Iterator[bool]:
    """Connect to a cluster, or start one for as long as the context lasts; yields whether it is our own."""
    for key, value in (DRIVER_ENV | WORKER_ENV).items():
        os.environ.setdefault(key, value)
    # In notebooks Ray asks for widgets, which nothing here shows.
    warnings.filterwarnings("ignore", "IProgress not found")
    logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)
    import ray

    if ray.is_initialized():
        yield False
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    own = address in (None, "local")
    if own:
        _make_private_token()
    try:
        # A cluster left over on this machine must not be joined by accident: "local" always starts a new one.
        with _on_loopback() if own else nullcontext(), handled_by():
            ray.init(
                address="local" if own else address,
                include_dashboard=False if own else None,
                logging_level="ERROR",
                log_to_driver=False,
            )
    except SystemExit as stop:  # by Ray's own handler of SIGTERM
        raise KeyboardInterrupt(signal.SIGTERM) if stop.code == signal.SIGTERM else stop from None
    except Exception as error:  # a node that is not there after 30 s on a busy machine is a plain Exception of Ray's
        where = "start on this machine" if own else f"be reached at {address}"
        raise EnvironmentProblem(
            f"Ray cannot {where}: {error}\n  try cluster.engine=local to train without Ray, or set cluster.address"
        ) from error
    try:
        yield own
    finally:
        ray.shutdown()


def _make_private_token() -> None:
    """Make the token that Ray asks for, where there is none: the file that Ray makes can be read by others."""
    given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    path = Path.home() / ".ray" / "auth_token"
    if given or path.exists() or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    with suppress(OSError):  # it has just been made, or cannot be, which Ray then says
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:  # nobody else may read it
            file.write(secrets.token_hex(32))
            file.flush()
            os.link(file.name, path)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A cluster started meanwhile listens on 127.0.0.1 alone: its metrics ask nobody for a token.

    That is what Ray does on macOS. Elsewhere it takes the host's own address, even where told 127.0.0.1.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def survey(config: Config) -> tuple[dict[str, float], str]:
    """The resources of the cluster that a run would use, and which cluster that is.

    Raises:
        EnvironmentProblem: where it cannot be reached or started.
    """
    with connected(config.cluster) as own:
        import ray

        address = config.cluster.address or os.environ.get("RAY_ADDRESS")
        return dict(ray.cluster_resources()), "starts on this machine" if own else f"cluster at {address}"
