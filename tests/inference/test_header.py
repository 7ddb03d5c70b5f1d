"""What an exported file says of itself: written, read again, and refused where it cannot be true."""

from __future__ import annotations

import json

import pytest
import torch

from densenet_dist.errors import CheckpointError
from densenet_dist.inference.header import header_of, make_header
from densenet_dist.model.variants import densenet


def valid_header():
    with torch.device("meta"):
        net = densenet("densenet_bc", num_classes=2, image_size=64)
    return make_header(
        net.architecture, version="1", run="r", data="folder", checkpoint="best", commit="abc", created="now",
        class_names=("a", "Käse ☂"), mean=(0.5, 0.4, 0.3), std=(1, 1, 1), crop=0.875, precision="fp32",
        metrics={"val/top1": 0.5},
    )  # fmt: skip


def test_what_is_written_is_read_again():
    assert header_of(valid_header().to_json(), "x") == valid_header()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h.update(format=2), "format"),
        (lambda h: h.update(mean=[float("nan"), 0, 0]), "mean.0"),
        (lambda h: h.update(class_names=["a"]), "1 class names for 2 classes"),
        (lambda h: h.update(run="\u202etxt"), "cannot be printed"),
        (lambda h: h["architecture"].update(growth_rate=10**9), "architecture.growth_rate"),
        (lambda h: h["architecture"].update(num_layers=[2000] * 3), "6000 layers, more than 2000"),
    ],
)
def test_what_cannot_be_true(change, said):
    content = json.loads(valid_header().to_json())
    change(content)
    with pytest.raises(CheckpointError, match="x: its metadata is not that of an exported model: ") as caught:
        header_of(json.dumps(content), "x")
    assert said in str(caught.value)


def test_what_is_no_header():
    with pytest.raises(CheckpointError, match="it has no densenet_dist in its metadata"):
        header_of(None, "x")
    with pytest.raises(CheckpointError, match="has 9,000,000 bytes"):
        header_of(" " * 9_000_000, "x")
    for text in ("", "[]", "[" * 100_000, b"\xff"):
        with pytest.raises(CheckpointError, match="is not that of an exported model"):
            header_of(text, "x")
