"""The losses of the notebook net's first steps, kept as text: what should change nothing leaves them as they are.

``python tests/train/test_golden.py`` writes them anew, after a change that is meant to change them.
"""

import tempfile
from pathlib import Path

import pytest
import torch

from densenet_dist.config import load_config
from densenet_dist.run_folder import RunFolder
from densenet_dist.train.context import RunContext
from densenet_dist.train.loop import train_step
from densenet_dist.train.trainer import Trainer

GOLDEN = Path(__file__).parents[1] / "golden" / "notebook_losses.txt"
STEPS = 20
SETTINGS = {
    "model": {"variant": "notebook", "growth_rate": 4, "num_layers": 2, "compression": 0.5, "drop_rate": 0.2},
    "data": {"name": "shapes", "limit": 400, "augment": "notebook", "normalize": "unit", "loader": "torch"},
    "train": {
        "global_batch_size": 16,
        "lr": 1e-3,
        "optimizer": {"name": "adam", "eps": 1e-7},
        "schedule": {"name": "multistep"},
    },
    "cluster": {"engine": "local", "device": "cpu"},
}


def losses(storage: str) -> list[float]:
    """The mean loss of each step."""
    config = load_config(SETTINGS, {"storage": storage})
    trainer = Trainer(config, RunContext(RunFolder(storage, config.name), torch.device("cpu")))
    trainer.train_model.train()
    found, before = [], 0.0
    for batch in trainer.train_loader.epoch(0):
        train_step(trainer, batch)
        total = float(trainer.metrics.sums[0])
        found.append((total - before) / batch.global_size)
        before = total
        if len(found) == STEPS:
            break
    return found


def test_the_losses_are_the_golden_ones(tmp_path):
    golden = [float(line) for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    assert len(golden) == STEPS
    for step, (loss, expected) in enumerate(zip(losses(str(tmp_path)), golden, strict=True)):
        assert loss == pytest.approx(expected, rel=1e-4 * 10 ** (step / 8)), f"step {step}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    head = [line for line in GOLDEN.read_text().splitlines() if line.startswith("#")]
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text("\n".join([*head, *(f"{loss:.7f}" for loss in losses(folder))]) + "\n")
