"""Secrets of the environment stay there: runs, on Ray too, `doctor` and `report` write and say nothing of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from densenet_dist.environment import cache_folder

MARKER = "MARKER7f3a91c5"
NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD",
         "WANDB_API_KEY", "HF_TOKEN", "GITHUB_TOKEN", "DENSENET_SECRET")  # fmt: skip
SECRETS = dict.fromkeys(NAMES, MARKER) | {
    "DATABASE_URL": f"postgres://u:{MARKER}@host/db",
    "MLFLOW_TRACKING_URI": f"https://u:{MARKER}@host",
}
QUICK = ("model.variant=densenet_bc", "model.growth_rate=4", "model.num_layers=[1, 1]",
         "data={limit: 128, test_limit: 128}", "train.epochs=1", "data.loader=torch")  # fmt: skip


def holding(folder: Path, *secrets: str) -> list[str]:
    """Files whose name or content holds a secret."""
    return [
        str(path)
        for path in folder.rglob("*")
        for secret in secrets
        if secret in path.name or (path.is_file() and secret.encode() in path.read_bytes())
    ]


def test_a_run_in_this_process(tmp_path: Path, monkeypatch, command):
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    for arguments in (["train", *QUICK, "cluster.engine=local", "name=here"], ["report", "runs/here"],
                      ["doctor", "cluster.engine=local"]):  # fmt: skip
        code, *said = command(*arguments)
        assert code == 0
        assert MARKER not in "".join(said)
    assert len(list((tmp_path / "runs" / "here").rglob("*"))) > 10
    assert holding(tmp_path, MARKER) == []


@pytest.mark.nightly
def test_a_run_on_a_cluster_of_its_own(tmp_path: Path):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = kept | SECRETS | {"HOME": str(tmp_path / "home"), "DENSENET_DIST_CACHE": str(cache_folder())}
    (tmp_path / "home").mkdir()
    line = [sys.executable, "-m", "densenet_dist", "train", *QUICK, "cluster.workers=1", "cluster.device=cpu"]
    done = subprocess.run([*line, "name=there"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    token = tmp_path / "home" / ".ray" / "auth_token"
    secret = token.read_text()  # Ray makes one where it asks for one: nobody else can use the cluster
    assert len(secret) >= 32
    assert token.stat().st_mode & 0o777 == 0o600
    assert MARKER not in done.stdout + done.stderr
    assert secret not in done.stdout + done.stderr
    assert (tmp_path / "runs" / "there" / "summary.json").exists()
    assert holding(tmp_path / "runs", MARKER, secret) == []
