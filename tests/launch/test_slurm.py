"""The batch job: its shape, and what it does in each turn, with stand-ins for Slurm's commands and for Ray."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.scripts.scripts import start
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args
from ray_runs import until

from densenet_dist.config import load_config

SBATCH = Path(__file__).parents[2] / "launch" / "slurm" / "train.sbatch"
# srun starts its command; ray writes down its arguments and environment and does what the test says.
STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'echo "$@" >> "$LOG/scontrol"; exit "${SCONTROL_CODE:-0}"',
    "ray": 'printf "%s\\n" "$@" > "$LOG/ray"; env > "$LOG/env"; eval "$RAY_DOES"',
    "python": f'exec "{sys.executable}" "$@"',
}


class Turn:
    """A turn of the job in a project folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self.log.mkdir()
        (folder / "launch").symlink_to(SBATCH.parents[1])
        binaries = folder / ".venv" / "bin"
        binaries.mkdir(parents=True)
        for name, text in STAND_INS.items():
            (binaries / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (binaries / name).chmod(0o755)

    def start(self, *arguments: str, does: str = "", **environment: str) -> subprocess.Popen[str]:
        """Start the script; by default Ray trains the run to its end."""
        run = self.folder / "runs" / environment.get("RUN_NAME", "densenet-42")
        slurm = {
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "9",
            "SLURM_GPUS_ON_NODE": "4",
            "HEAD_IP": "10.0.0.5",
            "LOG": str(self.log),
            "RAY_DOES": does or f"mkdir -p {run}; touch {run}/config.yaml {run}/summary.json",
        }
        command = ["bash", SBATCH, *arguments, f"storage={self.folder}/runs"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = os.environ | slurm | environment
        return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)

    def run(self, *arguments: str, code: int = 0, **environment: str) -> tuple[list[str], list[str]]:
        """Run the script; Ray's options, and the command that it got."""
        process = self.start(*arguments, **environment)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == code, output
        words = (self.log / "ray").read_text().splitlines()
        return words[: words.index("--")], words[words.index("--") + 1 :]

    def wait_for(self, name: str) -> str:
        """What a stand-in wrote, once it is there."""
        return str(until(lambda: (self.log / name).exists() and (self.log / name).read_text(), 60))


@pytest.fixture
def turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Turn:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    return Turn(tmp_path)


def test_the_shape_is_that_of_the_values(rendered):
    text, values, workers = rendered.files["slurm/train.sbatch"], rendered.values, rendered.values["workers"]
    header = text[: text.index("set -euo pipefail")]
    assert not [line for line in header.splitlines() if not line.startswith("#")][1:]  # Slurm stops reading there
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", header, re.MULTILINE))
    assert (options["nodes"], options["gpus-per-node"]) == (str(workers["count"]), str(workers["gpus"]))
    assert (options["cpus-per-task"], options["mem"]) == (str(workers["cpus"]), f"{workers['memory_gib']}G")
    assert (options["signal"], options["requeue"], options["open-mode"]) == ("B:USR1@120", "", "append")
    assert all(f"\nexport {key}={value}\n" in text for key, value in values["env"].items())


def test_a_first_turn_starts_the_run_on_all_nodes(turn, root, values):
    options, command = turn.run()
    assert options[0] == "symmetric-run"
    assert dict(zip(options[1::2], options[2::2], strict=True)) == {
        "--address": "10.0.0.5:6379",
        "--min-nodes": "2",
        "--num-cpus": "9",
        "--num-gpus": "4",
        "--temp-dir": "/tmp/ray-42",
    }
    for_start = curate_and_validate_ray_start_args(options[1:])
    assert start.make_context("start", ["--head", *for_start]).params["num_gpus"] == 4
    assert command[:4] == ["python", "launch/start.py", "train", values["config"]]
    config = load_config(str(root / values["config"]), *command[4:])
    assert (config.name, config.storage) == ("densenet-42", f"{turn.folder}/runs")  # the command line wins
    assert config.data.root == values["data_root"]
    assert (config.cluster.workers, config.cluster.cpus_per_worker) == (8, 2)
    assert config.cluster.address == "10.0.0.5:6379"


def test_every_job_has_a_new_token_and_metrics_on_demand_only(turn):
    tokens = set()
    for port in ("", "8090"):
        options, _ = turn.run(RAY_ADDRESS="10.9.9.9:6379", METRICS_PORT=port)
        environment = (turn.log / "env").read_text().splitlines()
        assert "RAY_AUTH_MODE=token" in environment
        assert not [line for line in environment if line.startswith("RAY_ADDRESS=")]  # of another cluster
        assert ("--metrics-export-port" in options) is bool(port)
        assert ("RAY_enable_metrics_collection=0" in environment) is (port == "")
        tokens |= {line for line in environment if re.fullmatch("RAY_AUTH_TOKEN=[0-9a-f]{64}", line)}
    assert len(tokens) == 2


def test_the_job_takes_settings_and_fails_with_the_command_and_where_ray_never_started(turn):
    _, command = turn.run("configs/x.yaml", "train.epochs=3", RUN_NAME="old", does="exit 6", code=6)
    assert command[3] == "configs/x.yaml"
    assert {"name=old", "train.epochs=3"} <= set(command)
    turn.run(does="true", code=1)  # symmetric-run exits with 0 then
    assert not (turn.log / "scontrol").exists()


@pytest.mark.parametrize("scontrol_code", ["0", "1"])
def test_before_its_time_is_up_the_job_is_requeued_and_waits_for_its_end(turn, scontrol_code):
    process = turn.start(does="echo up > $LOG/up; sleep 60; exit 9", SCONTROL_CODE=scontrol_code)
    turn.wait_for("up")
    process.send_signal(signal.SIGUSR1)  # to the script alone, as --signal=B: does
    assert turn.wait_for("scontrol") == "requeue 42\n"
    time.sleep(0.3)
    assert process.poll() is None  # it is Slurm that ends the turn
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "back into the queue" in output
    assert ("RUN_NAME=densenet-42" in output) is (scontrol_code != "0")


def test_the_run_is_saved_before_the_job_is_requeued(turn):
    """With a real driver, which the stand-in for Ray starts as symmetric-run does; it passes no signal on either."""
    local = ("configs/quickstart.yaml", "cluster.engine=local", "train.epochs=500", "data.limit=640")
    command = 'while [[ $1 != -- ]]; do shift; done; shift; "$@"'
    alone = {"SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "0", "SLURM_CPUS_PER_TASK": "2"}
    process = turn.start(*local, f"data.root={turn.folder}", does=command, SLURM_JOB_ID=f"test-{os.getpid()}",
                         RUN_NAME="saved", **alone)  # fmt: skip
    until(lambda: process.poll() or list(turn.folder.glob("runs/saved/checkpoints/step-*")), 120)
    process.send_signal(signal.SIGUSR1)
    assert turn.wait_for("scontrol").startswith("requeue test-")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143, output
    assert re.search(r"the time is nearly up: saving(.|\n)*stopped; the checkpoint of step \d+ is saved", output)
    assert not list(Path("/tmp").glob(f"driver-test-{os.getpid()}*"))
