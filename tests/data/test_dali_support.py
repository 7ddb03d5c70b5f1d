"""Where DALI is missing, broken or cannot work, one message says so with versions and the way out; torch goes on."""

import importlib
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from nvidia import dali
from nvidia.dali import backend
from runs import TINY

from densenet_dist.data import dali_loader
from densenet_dist.data.dali_loader import require_dali
from densenet_dist.errors import EnvironmentProblem

CPU = torch.device("cpu")


def problem(device: torch.device = CPU, *, decoding: bool = False) -> str:
    """What is said where DALI cannot work."""
    with pytest.raises(EnvironmentProblem) as raised:
        require_dali(device, decoding=decoding)
    assert raised.value.exit_code == 3
    assert "data.loader=torch" in str(raised.value)
    return str(raised.value)


def test_training_goes_on_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., tuple[int, str, str]]
) -> None:
    """Left to the program it takes torch and says so; asked for DALI, it says what is missing."""
    monkeypatch.setattr(dali_loader.util, "find_spec", lambda name: None)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    for loader, expected in (("auto", 0), ("dali", 3)):
        code, *said = command("train", "tiny.yaml", f"name={loader}", f"data.loader={loader}", "train.epochs=1")
        assert code == expected
        assert "DALI is not installed" in "".join(said)
    assert "pip install nvidia-dali-cuda130\n" in problem()


def test_a_part_of_it_is_missing_or_it_finds_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    require_dali(CPU, decoding=True)
    monkeypatch.setattr(backend, "GetNvimgcodecVersion", lambda: -1)
    require_dali(CPU, decoding=False)  # no matter for images in memory
    assert f"DALI {dali.__version__} cannot decode images: nvidia-nvimgcodec-cu13 is miss" in problem(decoding=True)
    monkeypatch.setattr(backend, "GetCUDADeviceCount", lambda: 0)
    assert "cannot be used on cuda: no GPU\n  update the NVIDIA driver" in problem(torch.device("cuda"))
    missing = ImportError("libdali_core.so: cannot open shared object file")
    monkeypatch.setattr(importlib, "import_module", Mock(side_effect=missing))
    said = problem()
    assert f"DALI {dali.__version__} cannot be used on cpu: libdali_core.so" in said
    assert "pip install --force-reinstall nvidia-dali-cuda130" in said
