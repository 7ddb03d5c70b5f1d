"""The batch job: its shape, and what it does in each turn, with stand-ins for Slurm's commands and for Ray."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.scripts.scripts import cli, start
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

from densenet_dist.config import load_config

SBATCH = Path(__file__).parents[2] / "launch" / "slurm" / "train.sbatch"
# A turn's srun starts its command; ray writes down what it was told and does what the test says.
STAND_INS = {
    "srun": 'echo "$@" >> "$TOLD/srun"; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'echo "$@" >> "$TOLD/scontrol"; exit "${SCONTROL_CODE:-0}"',
    "ray": 'printf "%s\\n" "$@" > "$TOLD/ray"; env > "$TOLD/env"; eval "$RAY_DOES"',
    "python": f'exec {shlex.quote(sys.executable)} "$@"',
}


class Turn:
    """A turn of the job in a project's folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.told = folder, folder / "told"
        self.told.mkdir()
        (folder / "launch").symlink_to(SBATCH.parents[1])
        binaries = folder / ".venv" / "bin"
        binaries.mkdir(parents=True)
        for name, text in STAND_INS.items():
            (binaries / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (binaries / name).chmod(0o755)

    def start(self, *arguments: str, does: str, **environment: str) -> subprocess.Popen[str]:
        slurm = {
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "9",
            "SLURM_GPUS_ON_NODE": "4",
            "HEAD_IP": "10.0.0.5",
            "TOLD": str(self.told),
            "RAY_DOES": does,
        }
        command = ["bash", SBATCH, f"storage={self.folder}/runs", *arguments]
        if arguments[:1] and arguments[0].endswith(".yaml"):
            command = ["bash", SBATCH, *arguments, f"storage={self.folder}/runs"]
        return subprocess.Popen(
            command,
            env=os.environ | slurm | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def ray(self) -> tuple[list[str], list[str]]:
        """What Ray was told: its options, and the command."""
        words = (self.told / "ray").read_text().splitlines()
        return words[: words.index("--")], words[words.index("--") + 1 :]

    def finish(self, name: str = "densenet-42") -> str:
        """What Ray does in a turn that trains to the end."""
        run = self.folder / "runs" / name
        return f"mkdir -p {run}; touch {run}/config.yaml {run}/summary.json"


@pytest.fixture
def turn(tmp_path: Path) -> Turn:
    return Turn(tmp_path)


def test_bash_can_read_it(files, tmp_path):
    (tmp_path / "job").write_text(files["slurm/train.sbatch"])
    done = subprocess.run(["bash", "-n", tmp_path / "job"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["slurm/train.sbatch", "local.sh", "build_without_engine.sh", "try_image.sh"])
def test_shellcheck_has_nothing_to_say(root, script):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, root / "launch" / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_shape_is_that_of_the_values(variant, files):
    text = files["slurm/train.sbatch"]
    header = text[: text.index("set -euo pipefail")]
    assert not [line for line in header.splitlines() if not line.startswith("#")][1:]  # Slurm stops reading there
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", header, re.MULTILINE))
    workers = variant["workers"]
    assert options == {
        "job-name": variant["name"],
        "nodes": str(workers["count"]),
        "ntasks-per-node": "1",
        "cpus-per-task": str(workers["cpus"]),
        "gpus-per-node": str(workers["gpus"]),
        "mem": f"{workers['memory_gib']}G",
        "exclusive": "",
        "time": variant["slurm"]["turn"],
        "signal": "B:USR1@120",
        "requeue": "",
        "open-mode": "append",
        "output": "%x-%j.log",
    }
    assert text.startswith("#!/usr/bin/env bash\n")
    for key, value in variant["env"].items():
        assert f"\nexport {key}={value}\n" in text


def test_a_first_turn_starts_the_run_on_all_nodes(turn, root, values):
    process = turn.start(does=turn.finish())
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    options, command = turn.ray()
    assert options[0] == "symmetric-run"
    assert "symmetric-run" in cli.commands
    told = dict(zip(options[1::2], options[2::2], strict=True))
    assert told == {
        "--address": "10.0.0.5:6379",
        "--min-nodes": "2",
        "--num-cpus": "9",
        "--num-gpus": "4",
        "--temp-dir": "/tmp/ray-42",
    }
    # Ray's own parsers take it, for the first node and for the others.
    for_start = curate_and_validate_ray_start_args(options[1:])
    assert start.make_context("start", ["--head", *for_start]).params["num_gpus"] == 4
    assert start.make_context("start", ["--address", "10.0.0.5:6379", *for_start]).params["temp_dir"] == "/tmp/ray-42"
    assert command[:4] == ["python", "launch/start.py", "train", values["config"]]
    config = load_config(str(root / values["config"]), *command[4:])
    assert config.name == "densenet-42"
    assert config.storage == f"{turn.folder}/runs"  # what is given wins over the values
    assert config.data.root == values["data_root"]
    assert config.cluster.workers == 8
    assert config.cluster.cpus_per_worker == 2
    assert config.cluster.address == "10.0.0.5:6379"
    first, last = (turn.told / "srun").read_text().splitlines()
    assert first.startswith("--cpus-per-task=9 --kill-on-bad-exit=1 ray symmetric-run ")
    assert last == "rm -rf /tmp/ray-42"


def test_the_token_is_new_for_every_job_and_in_the_environment(turn, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    tokens = set()
    for _ in range(2):
        turn.start(does=turn.finish(), RAY_ADDRESS="10.9.9.9:6379").communicate(timeout=60)
        environment = (turn.told / "env").read_text()
        assert "\nRAY_AUTH_MODE=token\n" in f"\n{environment}"
        assert "\nRAY_ADDRESS=" not in f"\n{environment}"  # of another cluster
        tokens |= set(re.findall(r"^RAY_AUTH_TOKEN=([0-9a-f]{64})$", environment, re.MULTILINE))
    assert len(tokens) == 2
    turn.start(does=turn.finish(), RAY_AUTH_TOKEN="a" * 64).communicate(timeout=60)
    assert f"\nRAY_AUTH_TOKEN={'a' * 64}\n" in (turn.told / "env").read_text()


def test_figures_for_prometheus_are_served_on_demand_only(turn):
    turn.start(does=turn.finish()).communicate(timeout=60)
    assert "--metrics-export-port" not in turn.ray()[0]
    assert "\nRAY_enable_metrics_collection=0\n" in f"\n{(turn.told / 'env').read_text()}"
    turn.start(does=turn.finish(), METRICS_PORT="8090").communicate(timeout=60)
    for_start = curate_and_validate_ray_start_args(turn.ray()[0][1:])
    assert start.make_context("start", ["--head", *for_start]).params["metrics_export_port"] == 8090
    assert "RAY_enable_metrics_collection" not in (turn.told / "env").read_text()


def test_another_configuration_and_a_run_of_before(turn):
    process = turn.start("configs/x.yaml", "train.epochs=3", does=turn.finish("old"), RUN_NAME="old")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    command = turn.ray()[1]
    assert command[3] == "configs/x.yaml"
    assert "name=old" in command
    assert "train.epochs=3" in command


def test_nodes_without_gpus_run_one_rank_each(turn):
    turn.start(does=turn.finish(), SLURM_GPUS_ON_NODE="").communicate(timeout=60)
    options, command = turn.ray()
    assert options[options.index("--num-gpus") + 1] == "0"
    assert {"cluster.workers=2", "cluster.cpus_per_worker=8"} <= set(command)


def test_the_command_fails_and_so_does_the_job(turn):
    process = turn.start(does="exit 6")
    process.communicate(timeout=60)
    assert process.returncode == 6
    assert not (turn.told / "scontrol").exists()


def test_a_ray_that_never_started_is_a_failure(turn):
    process = turn.start(does="true")  # symmetric-run ends with 0 then
    process.communicate(timeout=60)
    assert process.returncode == 1


@pytest.mark.parametrize("allowed", ["0", "1"])
def test_before_its_time_is_up_the_job_is_requeued_and_waits_for_its_end(turn, allowed):
    process = turn.start(does="touch $TOLD/up; sleep 60; exit 9", SCONTROL_CODE=allowed)
    wait_for(turn.told / "up")
    process.send_signal(signal.SIGUSR1)  # to the script alone, as --signal=B: does
    wait_for(turn.told / "scontrol")
    assert (turn.told / "scontrol").read_text() == "requeue 42\n"
    time.sleep(0.3)
    assert process.poll() is None  # it is Slurm that ends the turn
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "back into the queue" in output
    assert ("RUN_NAME=densenet-42" in output) is (allowed != "0")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and (path.name == "up" or path.read_text().endswith("\n"))):
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.05)
