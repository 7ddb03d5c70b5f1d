"""Training through Ray Train, as a user starts it: a real cluster, real signals."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from ray_runs import RAY_NOISE, Run, assert_gone, is_ray_process, records, until

import densenet_dist
from densenet_dist.cli import main
from densenet_dist.cluster.launch import fit
from densenet_dist.config import load_config
from densenet_dist.errors import StorageError
from densenet_dist.train.evaluation import evaluate


def test_a_run_explains_itself(undisturbed, capsys):
    run, text = undisturbed, undisturbed.text()
    assert not RAY_NOISE.search(text), text
    assert "2 x CPU" in text
    assert [line.split()[1] for line in text.splitlines() if line.startswith("epoch")] == ["1/4", "2/4", "3/4", "4/4"]
    expected = {"config.yaml", "env.json", "metrics.jsonl", "summary.json", "checkpoints", "tb", "report.html"}
    assert expected <= {path.name for path in run.folder.iterdir()}
    assert [line["epoch"] for line in records(run.folder) if "train/loss" in line] == [1, 2, 3, 4]
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert f"{summary['test/top1']:.2%}" in text
    assert str(run.folder) in text

    found = evaluate(undisturbed.folder)  # by one process, where two workers found the figures of the summary
    assert found["top1"] == pytest.approx(summary["test/top1"])
    assert found["loss"] == pytest.approx(summary["test/loss"], rel=1e-5)

    with pytest.raises(StorageError, match=f"exists already(.|\\n)*--resume {run.folder}"):
        fit(load_config(run.folder / "config.yaml"), listener=list)
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--resume", str(run.folder)])
    assert "finished already" in capsys.readouterr().out


def listening_addresses(run: Run) -> set[str]:
    """Where the cluster of a run listens, but for torch's store, in the workers, which listens everywhere."""
    pids = {process.pid for process in run.descendants() if not is_ray_process(process, "RayTrainWorker")}
    listening = [each for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.pid in pids]
    assert len(listening) > 5
    return {each.laddr.ip.removeprefix("::ffff:") for each in listening}


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.nightly), (signal.SIGHUP, 129)]
)
def test_interruption_leaves_no_process(start, number, code):
    run = start("train.epochs=500")
    run.wait_for("epoch   2/500")
    family = run.descendants()
    assert any("raylet" in process.name() for process in family)
    # Ray changes titles while it works, and a process that a worker starts has the worker's sockets for a moment: what
    # one look finds may be gone at the next.
    until(lambda: listening_addresses(run) == {"127.0.0.1"}, 30)
    run.interrupt(number)
    assert run.wait(90) == code, run.text()
    assert f"train --resume {run.folder}" in run.text()
    assert_gone(family)


def test_a_lost_coordinator_is_replaced(start):
    run = start("train.epochs=500")
    run.wait_for("epoch   2/500")
    [coordinator] = [process for process in run.descendants() if is_ray_process(process, "Coordinator")]
    assert coordinator.memory_info().rss < 200 * 2**20, "it does without torch"
    coordinator.kill()
    shown = len(records(run.folder))
    run.wait_for(f"epoch {shown + 3:3}/500")
    run.interrupt(signal.SIGINT)
    assert run.wait(90) == 130, run.text()
    assert re.search(r"stopped; the checkpoint of step \d+ is saved", run.text()), run.text()


LIMITED = """
def _limited(self, images, *arguments, _whole=Trainer.forward_backward):
    if self.context.rank == 1 and self.position.global_step >= 11 and len(images) > 16:
        raise torch.OutOfMemoryError("injected")
    return _whole(self, images, *arguments)

Trainer.forward_backward = _limited
"""


def test_workers_that_run_out_of_memory_restart_with_smaller_micro_batches(start, tmp_path, monkeypatch):
    shutil.copytree(Path(densenet_dist.__file__).parent, tmp_path / "changed" / "densenet_dist")
    with open(tmp_path / "changed" / "densenet_dist" / "train" / "trainer.py", "a") as file:
        file.write(LIMITED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "changed"))
    monkeypatch.chdir(tmp_path)  # so that Python finds that package first
    run = start("train.epochs=2", "cluster.max_failures=0")
    assert run.wait() == 0, run.text()
    assert re.search(r"rank 1 ran out of memory at step 11: .* 2 micro-batches; all workers are restarted", run.text())
    assert json.loads((run.folder / "env.json").read_text())["grad_accum_steps"] == {"11": 2}
    assert json.loads((run.folder / "summary.json").read_text())["global_step"] == 18
