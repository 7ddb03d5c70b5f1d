"""The scripts in examples/, run small."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ["data.image_size=16", "train.epochs=1", "train.global_batch_size=8", "model.num_layers=[1,1]"]


def test_pictures_of_ones_own(tmp_path):
    random = np.random.default_rng(0)
    for label, name in enumerate(("apple", "pear")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(20):
            pixels = random.integers(0, 120, (24, 30, 3))
            pixels[..., label] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{number}.png")
    command = [sys.executable, str(EXAMPLES / "my_dataset.py"), "photos", *SMALL, "data.loader=torch"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "runs/my-dataset/report.html" in done.stdout
    assert "validation: {'loss'" in done.stdout
    assert (tmp_path / "runs" / "my-dataset" / "confusion.png").exists()
