"""The losses of the notebook net's first steps, kept as text: what should change nothing leaves them as they are.

``python tests/train/test_golden.py`` writes them anew, after a change that is meant to change them.
"""

import tempfile
from pathlib import Path

import pytest
import torch

from densenet_dist.config import load_config
from densenet_dist.run_folder import RunFolder
from densenet_dist.train.building import build_job
from densenet_dist.train.context import LocalContext
from densenet_dist.train.engine import train_step

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
HEAD = """\
# Mean training loss of each of the first 20 steps of the notebook net, 4 maps a layer and 2 layers a block, on shapes:
# batch 16, the notebook's augmentation, Adam at 1e-3, dropout 0.2, float32, one thread, on an AMD EPYC with AVX-512.
# Kinds of CPU round differently, and Adam's first steps are as large for a tiny gradient as for a large one, so a
# difference in rounding grows about tenfold every 5 steps: with AVX2 the losses below differ by up to a relative 7e-5,
# with two threads by up to 6e-3 (the 19th). tests/train/test_golden.py holds the settings, allows for that, and writes
# this file anew when it is run as a script.
"""


def losses(storage: str) -> list[float]:
    """The mean loss of each step."""
    config = load_config(SETTINGS, {"storage": storage})
    job = build_job(config, LocalContext(RunFolder(storage, config.name), torch.device("cpu")))
    job.forward.train()
    found, before = [], 0.0
    for batch in job.train_loader.epoch(0):
        train_step(job, batch)
        total = float(job.metrics.sums[0])
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
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(HEAD + "".join(f"{loss:.7f}\n" for loss in losses(folder)))
