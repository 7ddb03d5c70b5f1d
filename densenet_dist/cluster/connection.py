"""Connect to a running Ray cluster, or start a private one."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from densenet_dist.cluster.signals import handled_by
from densenet_dist.errors import EnvironmentProblem
from densenet_dist.schema import ClusterConfig

# Spinning OpenMP threads of workers that share cores made training 30 times slower.
WORKER_ENV = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}
DRIVER_ENV = {
    "RAY_worker_niceness": "0",  # Ray's default is 15: other processes would come first
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^A worker died or was killed",  # reported as an event when the workers are restarted
}
EXCLUDED = (
    *("/data/", "/runs/", ".venv/", ".git/", "__pycache__/", "*.pyc"),
    *(".env", ".env.*", ".netrc", ".aws/", ".ssh/", "*.pem", "*.key"),  # all users of the cluster can read the files
)
"""What is not uploaded with a working directory, besides what .gitignore and .rayignore name."""
_RESPONSE_TIMEOUT_S = 10.0
# An HTTP/2 frame of type 4, which both sides send first (RFC 9113).
_HTTP2_SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _HTTP2_SETTINGS


@contextmanager
def connected(config: ClusterConfig, *, ships_code: bool = False) -> Iterator[bool]:
    """Connect to a cluster, or start a private one, until the context ends; yield whether it is private.

    With `ships_code`, the working directory is uploaded to a cluster that is joined, where workers import from it.

    Raises:
        EnvironmentProblem: the cluster cannot be reached or started.
    """
    require_cluster(config)
    import ray
    from ray._private import ray_constants

    if ray.is_initialized():
        yield False
        return
    address, source = address_of(config)
    own = address is None
    if own:
        _make_private_token()
    # When a terminal closes, all processes of a command receive SIGHUP. Ray's processes inherit this mask, so that they
    # live until the last checkpoint is written.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP} if own else ())
    on_network = ray_constants.ENABLE_RAY_CLUSTER
    try:
        # The metrics of a private cluster need no token, so it listens on 127.0.0.1 only, as on macOS. On Linux Ray
        # would use the host's address, even if 127.0.0.1 is given.
        ray_constants.ENABLE_RAY_CLUSTER = on_network and not own
        # "local" always starts a new cluster: one left over on this machine must not be joined by accident.
        with handled_by():
            ray.init(
                address=address or "local",
                include_dashboard=False if own else None,
                # A submitted job may have one already, which cannot be replaced.
                runtime_env={"working_dir": ".", "excludes": list(EXCLUDED)}
                if ships_code and not own and '"working_dir"' not in os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")
                else None,
                logging_level="ERROR",
                log_to_driver=False,
            )
    except SystemExit as stop:  # from Ray's handler of SIGTERM
        raise KeyboardInterrupt(signal.SIGTERM) if stop.code == signal.SIGTERM else stop from None
    except Exception as error:  # Ray raises a plain Exception if a node has not started after 30 s
        where = "start on this machine" if own else f"be reached at {source}={address}"
        raise EnvironmentProblem(
            f"Ray cannot {where}: {error}\n  try cluster.engine=local to train without Ray, or set cluster.address"
        ) from error
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = on_network
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield own
    finally:
        ray.shutdown()


def address_of(config: ClusterConfig) -> tuple[str | None, str]:
    """Return the address of the cluster to join (None: a private one), and the setting or variable it is from."""
    address, source = config.address, "cluster.address"
    if not address:
        address, source = os.environ.get("RAY_ADDRESS"), "RAY_ADDRESS"
    return None if address in (None, "", "local") else address, source


def require_cluster(config: ClusterConfig) -> None:
    """Import Ray, and check that the cluster to join, if any, responds: Ray itself would retry for 15 minutes.

    Raises:
        EnvironmentProblem: it does not respond, or the address is not one that can be joined.
    """
    for key, value in (DRIVER_ENV | WORKER_ENV).items():  # Ray reads some when it is imported
        os.environ.setdefault(key, value)
    # In notebooks Ray asks to install widgets, which are not used here.
    warnings.filterwarnings("ignore", "IProgress not found")
    logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)
    import ray

    fix = (
        "on a machine of the cluster, use HOST:PORT of its head (port 6379 by default) or auto; from other machines, "
        "submit a job:\n  densenet-dist submit --address http://HEAD:8265 train ..."
    )
    if ray.is_initialized():
        if ray.util.client.ray.is_connected():
            raise EnvironmentProblem(
                "this process is connected to a cluster by Ray Client (ray://), which is not supported\n"
                f"  call ray.shutdown() first; {fix}"
            )
        return
    address, source = address_of(config)
    if address is None:
        return
    if "://" in address:
        raise EnvironmentProblem(f"{source}={address}: a run cannot join a cluster at a URL\n  {fix}")
    from ray._private.services import canonicalize_bootstrap_address

    try:
        host, _, port = (canonicalize_bootstrap_address(address) or "").rpartition(":")
        timeout_s = min(config.timeout_s, _RESPONSE_TIMEOUT_S)
        with socket.create_connection((host.strip("[]"), int(port)), timeout_s) as connection:
            connection.sendall(_HTTP2_PREFACE)
            if connection.recv(9)[3:4] != _HTTP2_SETTINGS[3:4] and os.environ.get("RAY_USE_TLS", "0") == "0":
                raise ConnectionError("the server is not the head of a Ray cluster")
    except Exception as error:
        raise EnvironmentProblem(
            f"there is no Ray cluster at {source}={address}: {error}\n"
            f"  correct or remove {source}; without it, a cluster is started on this machine"
        ) from error


def _make_private_token() -> None:
    """Create Ray's authentication token if there is none: other users could read the file that Ray creates."""
    given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    path = Path.home() / ".ray" / "auth_token"
    if given or path.exists() or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    token = secrets.token_hex(32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:  # readable by its owner alone
            file.write(token)
            file.flush()
            os.link(file.name, path)
    except FileExistsError:
        pass  # created by another process
    except OSError:  # a read-only home folder: pass it to the cluster's processes
        os.environ["RAY_AUTH_TOKEN"] = token
