"""What the tests of training share: one thread, and a server that speaks S3."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    # Nets this small gain nothing from more, and the golden losses were written with one.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
