"""The official files become the right arrays, and nothing else passes for them."""

from pathlib import Path

import numpy as np
import pytest
from toy_cifar import Toy

from densenet_dist.data import cifar
from densenet_dist.data.datasets import DATASET_NAMES, load_dataset, prepare_dataset
from densenet_dist.errors import ConfigError, DataError


@pytest.mark.parametrize(("name", "a_class"), [("cifar10", 5000), ("cifar100", 500)])
def test_arrays_are_the_raw_bytes_of_the_official_files(official: Path, name: str, a_class: int) -> None:
    spec, dataset = cifar.SPECS[name], load_dataset(name, official, download=False)
    for split, files in ((dataset.train, spec.train), (dataset.test, (spec.test,))):
        raw = np.concatenate([np.fromfile(official / spec.folder / file, dtype=np.uint8) for file in files])
        raw = raw.reshape(-1, spec.record_bytes)
        assert split.images.flags.c_contiguous
        assert split.labels.dtype == np.int64
        assert np.array_equal(split.labels, raw[:, spec.label_bytes - 1])
        planes = raw[:, spec.label_bytes :].reshape(-1, 3, 32, 32)
        assert np.array_equal(split.images, planes.transpose(0, 2, 3, 1))
    assert np.bincount(dataset.train.labels).tolist() == [a_class] * dataset.num_classes
    assert np.bincount(dataset.test.labels).tolist() == [a_class // 5] * dataset.num_classes
    names = {"cifar10": ["airplane", "truck"], "cifar100": ["apple", "worm"]}[name]
    assert [dataset.class_names[0], dataset.class_names[-1]] == names
    levels = np.arange(256) / 255
    counts = np.stack([np.bincount(dataset.train.images[..., channel].ravel(), minlength=256) for channel in range(3)])
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ levels
    std = np.sqrt(share @ levels**2 - mean**2)
    np.testing.assert_allclose(dataset.mean, mean, rtol=0, atol=5e-5)
    np.testing.assert_allclose(dataset.std, std, rtol=0, atol=6e-5)


class TestFolder:
    def test_below_the_root_or_the_root_itself(self, toy: Toy, tmp_path: Path) -> None:
        folder = toy.write_folder(tmp_path / toy.spec.folder)
        found = [load_dataset("cifar10", root, download=False) for root in (tmp_path, str(folder))]
        assert np.array_equal(found[0].train.images, found[1].train.images)
        assert found[0].train.images.shape == (100, 32, 32, 3)
        assert found[0].test.images.shape == (20, 32, 32, 3)

    def test_limit_keeps_the_first(self, toy: Toy, tmp_path: Path) -> None:
        toy.write_folder(tmp_path / toy.spec.folder)
        whole, some = (load_dataset("cifar10", tmp_path, download=False, limit=limit) for limit in (None, 30))
        assert (len(some.train.labels), len(some.test.labels)) == (30, 20)
        assert len(load_dataset("cifar10", tmp_path, download=False, test_limit=7).test.labels) == 7
        assert np.array_equal(some.train.images, whole.train.images[:30])
        assert some.mean == whole.mean

        for key in ("limit", "test_limit"):
            with pytest.raises(ConfigError, match=f"^{key}=0"):
                load_dataset("cifar10", tmp_path, **{key: 0})

    def test_unknown_name(self, tmp_path: Path) -> None:
        for function in (load_dataset, prepare_dataset):
            with pytest.raises(ConfigError, match=r"'mnist'.*shapes, cifar10, cifar100"):
                function("mnist", tmp_path)
        assert set(DATASET_NAMES) == {"shapes", "folder", *cifar.SPECS}


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("data_batch_2.bin", None, r"an incomplete CIFAR-10: it lacks data_batch_2\.bin; delete .*data\.root="),
        ("data_batch_2.bin", b"x", r"data_batch_2\.bin is truncated: 1 bytes instead of \d+"),
        ("batches.meta.txt", bytes(999), r"batches\.meta\.txt is too long: 999 bytes instead of \d+"),
    ],
)
def test_damaged_folder(toy: Toy, tmp_path: Path, name: str, data: bytes | None, said: str) -> None:
    """One file is missing, or is something else."""
    path = toy.write_folder(tmp_path / toy.spec.folder) / name
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(DataError, match=said):
        load_dataset("cifar10", tmp_path, download=False)
