"""Runs that are told to stop, or that their machine will be gone."""

from __future__ import annotations

import logging
import signal
from typing import Final

from densenet_dist.chaos.case import case
from densenet_dist.chaos.lab import Lab, Observed, Skipped, expect, finish, interrupt, require_same

_GROUP: Final = "Stopped"
_RAY: Final = ("cluster.workers=2", "checkpoint.every_steps=null")
_LOCAL: Final = ("cluster.engine=local", "checkpoint.every_steps=null")
_SLOW: Final = ("train.global_batch_size=32", "data.limit=4000", "train.epochs=2")
"""So long that a signal comes within an epoch; no checkpoint is written there but for it."""
_REGION: Final = "us-east-1"
_KEYS: Final = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
_EXPECTED: Final = "saves, exits {}; resumed, it is the undisturbed run, bit for bit, and no step is taken twice"


def _stopped(lab: Lab, settings: tuple[str, ...], number: int) -> Observed:
    settings = (*settings, *_SLOW)
    run = lab.begin(*settings)
    run.wait_for("epoch   1/2")
    seconds = interrupt(run, number)
    expect("stopped; the checkpoint of step" in run.text, f"it did not say what it saved:\n{run.text[-2000:]}")
    step = run.saved
    again = lab.begin(resume=run.folder)
    finish(again, lab.undisturbed(*settings))
    expect(f"resumed after step {step}" in again.text, f"it did not go on after step {step}:\n{again.text}")
    return Observed(
        f"ended {seconds:.1f} s after the signal, step {step} saved; equal", 1, {"seconds to stop": [seconds]}
    )


@case(_GROUP, "SIGTERM to the driver of two Ray Train workers", _EXPECTED.format(143))
def terminated_on_ray(lab: Lab) -> Observed:
    """As Kubernetes, Slurm and `kill` do."""
    return _stopped(lab, _RAY, signal.SIGTERM)


@case(_GROUP, "Ctrl-C to the driver of two Ray Train workers", _EXPECTED.format(130))
def interrupted_on_ray(lab: Lab) -> Observed:
    """SIGINT."""
    return _stopped(lab, _RAY, signal.SIGINT)


@case(_GROUP, "SIGTERM to one process", _EXPECTED.format(143))
def terminated(lab: Lab) -> Observed:
    """Without Ray."""
    return _stopped(lab, _LOCAL, signal.SIGTERM)


@case(_GROUP, "SIGTERM while it still starts", "exits 143 at once; the same command may be started again")
def terminated_while_starting(lab: Lab) -> Observed:
    """There is nothing to save."""
    name = lab.name()
    run = lab.begin(*_RAY, name=name)
    run.wait_until(lambda: (run.folder / "env.json").exists(), "the run's folder")
    seconds = interrupt(run)
    finish(lab.begin(*_RAY, name=name), lab.undisturbed(*_RAY))
    return Observed(f"ended {seconds:.1f} s after the signal; then equal", 1, {})


@case(
    _GROUP,
    "SIGTERM; the machine is gone, and the run is resumed on another one from object storage",
    "the checkpoint is on the object store when the command ends; resumed there, it is the undisturbed run",
)
def moved_to_another_machine(lab: Lab) -> Observed:
    """A real S3 server on this machine; of the first machine nothing is left."""
    try:
        from moto.server import ThreadedMotoServer
    except ImportError:
        raise Skipped("the S3 server, moto, is not installed") from None
    import boto3  # type: ignore[import-untyped]

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        store = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name=_REGION, **_KEYS)
        store.create_bucket(Bucket="runs")
        environment = {"AWS_REGION": _REGION} | {key.upper(): value for key, value in _KEYS.items()}
        query = f"?scheme=http&endpoint_override={host}:{port}"
        name, settings = lab.name(), (*_LOCAL, *_SLOW)
        run = lab.begin(*settings, name=name, storage=f"s3://runs{query}", environment=environment)
        run.wait_for("epoch   1/2")
        interrupt(run)
        again = lab.begin(resume=f"s3://runs/{name}{query}", name=name, environment=environment)
        expect(again.wait() == 0, again.text[-2000:])
        expect("resumed after step" in again.text, again.text)
        keys = [item["Key"] for item in store.list_objects_v2(Bucket="runs", Prefix=f"{name}/")["Contents"]]
        for key in keys:
            if not key.endswith("/"):  # which stands for a folder
                (lab.folder / key).parent.mkdir(parents=True, exist_ok=True)
                store.download_file("runs", key, str(lab.folder / key))
        require_same(again.folder, lab.undisturbed(*settings))
    finally:
        server.stop()
    return Observed("equal")
