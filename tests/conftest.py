"""Fixtures for all tests: the official CIFAR files, where they lie beside the repository; a server that speaks S3."""

import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from densenet_dist.data import cifar

PACK = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the official binary files of both sets, extracted. Not to be written to."""
    if not (PACK / "unpack.py").is_file():
        pytest.skip(f"the CIFAR pack is not at {PACK}")
    out = tmp_path_factory.mktemp("official")
    unpack = [sys.executable, PACK / "unpack.py", "--format", "binary", "--out", out, "--dataset"]
    processes = [subprocess.Popen([*unpack, name], stdout=subprocess.DEVNULL) for name in cifar.SPECS]
    assert [process.wait() for process in processes] == [0, 0]
    return out


@pytest.fixture(scope="session")
def official_archive(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A re-packed archive of the official CIFAR-10 files. Not to be written to."""
    path = tmp_path_factory.mktemp("archive") / cifar.CIFAR10.archive
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(official / cifar.CIFAR10.folder, arcname=cifar.CIFAR10.folder)
    return path


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """``s3://bucket%s?...`` of an S3 server with the one bucket ``bucket``; credentials are in the environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        from pyarrow import fs

        address = f"scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"
        filesystem, _ = fs.FileSystem.from_uri(f"s3://bucket?{address}&allow_bucket_creation=true")
        filesystem.create_dir("bucket")
        yield f"s3://bucket%s?{address}"
        server.stop()
