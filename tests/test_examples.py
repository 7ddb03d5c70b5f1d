"""The scripts in examples/, run small."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from photos import write_photos

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ["data.image_size=16", "train.epochs=1", "train.global_batch_size=8", "model.num_layers=[1,1]"]


def test_pictures_of_ones_own(tmp_path):
    write_photos(tmp_path / "photos", ("apple", "pear"), 20)
    command = [sys.executable, str(EXAMPLES / "my_dataset.py"), "photos", *SMALL, "data.loader=torch"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "runs/my-dataset/report.html" in done.stdout
    assert "validation: {'loss'" in done.stdout
    assert (tmp_path / "runs" / "my-dataset" / "confusion.png").exists()
