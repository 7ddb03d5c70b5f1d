"""The cluster that is used: one that runs, or one of this process' own."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from densenet_dist.cluster.signals import handled_by
from densenet_dist.errors import EnvironmentProblem
from densenet_dist.schema import ClusterConfig, Config

# Spinning OpenMP threads of two workers on shared cores slow each other down thirtyfold.
WORKER_ENV = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}
# A dead worker is noticed at the controller's next poll, 2 s apart by default.
# Ray would nice workers to 15.
DRIVER_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_worker_niceness": "0",
    # Said in our own words when the workers start again.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^A worker died or was killed",
}
_ANSWER_S = 10.0
_SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # a frame of HTTP/2, of type 4, with which both sides begin (RFC 9113)
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS


@contextmanager
def connected(config: ClusterConfig) -> Iterator[bool]:
    """Connect to a cluster, or start one for as long as the context lasts; yields whether it is our own."""
    for key, value in (DRIVER_ENV | WORKER_ENV).items():
        os.environ.setdefault(key, value)
    # In notebooks Ray asks for widgets, which nothing here shows.
    warnings.filterwarnings("ignore", "IProgress not found")
    logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)
    import ray

    require_cluster(config)
    if ray.is_initialized():
        yield False
        return
    address, source = address_of(config)
    own = address is None
    if own:
        _make_private_token()
    # A closing terminal signals all processes of a command: Ray's, which inherit this mask, must outlive the saving.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP} if own else ())
    try:
        # A cluster left over on this machine must not be joined by accident: "local" always starts a new one.
        with _on_loopback() if own else nullcontext(), handled_by():
            ray.init(
                address=address or "local",
                include_dashboard=False if own else None,
                logging_level="ERROR",
                log_to_driver=False,
            )
    except SystemExit as stop:  # by Ray's own handler of SIGTERM
        raise KeyboardInterrupt(signal.SIGTERM) if stop.code == signal.SIGTERM else stop from None
    except Exception as error:  # a node that is not there after 30 s on a busy machine is a plain Exception of Ray's
        where = "start on this machine" if own else f"be reached at {source}={address}"
        raise EnvironmentProblem(
            f"Ray cannot {where}: {error}\n  try cluster.engine=local to train without Ray, or set cluster.address"
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield own
    finally:
        ray.shutdown()


def address_of(config: ClusterConfig) -> tuple[str | None, str]:
    """Return the address of the cluster to join, None for one of this process' own, and the name of what sets it."""
    address, source = config.address, "cluster.address"
    if not address:
        address, source = os.environ.get("RAY_ADDRESS"), "RAY_ADDRESS"
    return None if address in (None, "", "local") else address, source


def require_cluster(config: ClusterConfig) -> None:
    """Check that the cluster to join answers, if there is one: Ray itself tries for a quarter of an hour.

    Raises:
        EnvironmentProblem: it does not answer, or cannot be joined at such an address.
    """
    import ray

    elsewhere = (
        "on a machine of the cluster, give HOST:PORT of its head (port 6379 by default) or auto; from elsewhere, "
        "send the run there:\n  densenet-dist submit --address http://HEAD:8265 train ..."
    )
    if ray.is_initialized():
        if ray.util.client.ray.is_connected():
            raise EnvironmentProblem(
                "this process is connected to a cluster by Ray Client (ray://), through which a run cannot train\n"
                f"  call ray.shutdown() first; {elsewhere}"
            )
        return
    address, source = address_of(config)
    if address is None:
        return
    if "://" in address:
        raise EnvironmentProblem(f"{source}={address}: a run cannot join a cluster at such an address\n  {elsewhere}")
    from ray._private.services import canonicalize_bootstrap_address

    try:
        host, _, port = (canonicalize_bootstrap_address(address) or "").rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), min(config.timeout_s, _ANSWER_S)) as connection:
            connection.sendall(_GREETING)
            if connection.recv(9)[3:4] != _SETTINGS[3:4] and os.environ.get("RAY_USE_TLS", "0") == "0":
                raise ConnectionError("what answers there is not the head of a Ray cluster")
    except Exception as error:
        raise EnvironmentProblem(
            f"there is no Ray cluster at {source}={address}: {error}\n"
            f"  correct or remove {source}; without it, a cluster is started on this machine"
        ) from error


def _make_private_token() -> None:
    """Make the token that Ray asks for, where there is none: the file that Ray makes can be read by others."""
    given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    path = Path.home() / ".ray" / "auth_token"
    if given or path.exists() or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    token = secrets.token_hex(32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:  # nobody else may read it
            file.write(token)
            file.flush()
            os.link(file.name, path)
    except FileExistsError:
        pass  # another process has just made it
    except OSError:  # a read-only home folder: the processes of this cluster inherit it
        os.environ["RAY_AUTH_TOKEN"] = token


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

        address, _ = address_of(config.cluster)
        return dict(ray.cluster_resources()), "starts on this machine" if own else f"cluster at {address}"
