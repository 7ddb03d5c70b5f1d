"""What comes out of an archive, what is said of a damaged one, and what happens when several processes open it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_cifar import Toy, visible

from densenet_dist.data.cifar import CIFAR10
from densenet_dist.data.datasets import load_dataset
from densenet_dist.errors import DataError, StorageError

LOAD = """
import hashlib, sys
from densenet_dist.data.datasets import load_dataset
dataset = load_dataset("cifar10", sys.argv[1], download=False)
print(hashlib.sha256(dataset.train.images).hexdigest(), hashlib.sha256(dataset.test.images).hexdigest())
"""


def load(root: Path) -> None:
    load_dataset("cifar10", root, download=False)


def start_load(root: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", LOAD, str(root)], stdout=subprocess.PIPE, text=True)


class TestExtract:
    def test_truncated(self, toy: Toy, tmp_path: Path) -> None:
        path = toy.write_archive(tmp_path / toy.spec.archive)
        for keep in (0.99, 0.5, 0):
            os.truncate(path, int(keep * path.stat().st_size))
            with pytest.raises(DataError, match=rf"{path.name}.*(truncated|lacks).*delete .*data prepare cifar10"):
                load(tmp_path)
            assert visible(tmp_path) == [toy.spec.archive]

    def test_a_sound_archive_of_unsound_files(self, toy: Toy, tmp_path: Path) -> None:
        name = "data_batch_4.bin"
        flipped = bytearray(toy.files[name])
        flipped[777] ^= 1
        lacking = {other: data for other, data in toy.files.items() if other != name}
        for files, said in (
            ({**toy.files, name: bytes(flipped)}, rf"{name} in .*{toy.spec.archive} is damaged: its SHA-256"),
            ({**toy.files, name: b"short"}, rf"lacks {name}, or has them in another size"),
            (lacking, rf"not the CIFAR-10 archive: it lacks {name}"),
        ):
            toy.write_archive(tmp_path / toy.spec.archive, files=files)
            with pytest.raises(DataError, match=said):
                load(tmp_path)
            assert visible(tmp_path) == [toy.spec.archive]


class TestNotThere:
    def test_names_where_it_looked(self, tmp_path: Path) -> None:
        with pytest.raises(DataError) as caught:
            load(tmp_path)
        for place in ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", "test_batch.bin", "data.root="):
            assert place in str(caught.value)
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(DataError, match=r"nowhere does not exist; run `densenet-dist data prepare cifar10 --root"):
            load(tmp_path / "nowhere")

    def test_names_what_is_there_instead(self, tmp_path: Path) -> None:
        (tmp_path / "cifar-10-batches-py").mkdir()
        said = "cifar-10-batches-py is the pickled version, which is never read"
        for options in ({"download": False}, {"download": True, "url": (tmp_path / "no-network").as_uri()}):
            with pytest.raises(DataError, match=said):
                load_dataset("cifar10", tmp_path, **options)

    def test_root_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for root in (tmp_path / "file" / "below", Path("/proc")):
            with pytest.raises(StorageError, match=r"cannot store the data set in .*data\.root="):
                load_dataset("cifar10", root, download=True)


@pytest.mark.slow
class TestSeveralProcesses:
    def test_four_at_once(self, official: Path, official_archive: Path, tmp_path: Path) -> None:
        (tmp_path / CIFAR10.archive).symlink_to(official_archive)
        processes = [start_load(tmp_path) for _ in range(4)]
        found = [process.communicate()[0] for process in processes]
        expected = start_load(official).communicate()[0]
        assert [process.returncode for process in processes] == [0] * 4
        assert found == [expected] * 4
        assert visible(tmp_path) == [CIFAR10.folder, CIFAR10.archive]

    def test_killed_in_the_middle(self, official_archive: Path, tmp_path: Path) -> None:
        """Leaves nothing that could be taken for the data set, and the next one clears up."""
        (tmp_path / CIFAR10.archive).symlink_to(official_archive)
        aside = tmp_path / f".{CIFAR10.folder}.partial"
        process = start_load(tmp_path)
        while not (aside / "data_batch_2.bin").exists():
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert aside.exists()
        assert not (tmp_path / CIFAR10.folder).exists()
        load(tmp_path)
        assert visible(tmp_path) == [CIFAR10.folder, CIFAR10.archive]
