"""Fixtures: small sets of the form of the official ones; a folder on an object store, and a node's cache for it."""

import zlib
from pathlib import Path

import pytest
from s3_server import FaultyServer
from s3_store import Store

from densenet_dist.data.engine import ENGINES


@pytest.fixture(params=ENGINES)
def kind(request: pytest.FixtureRequest) -> str:
    """Each engine's name."""
    return str(request.param)


@pytest.fixture(autouse=True)
def remembered(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is remembered of pictures that were checked, away from the user's own."""
    base = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))
    return base / "densenet_dist" / "folders"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This node's cache."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("DENSENET_DIST_CACHE", str(tmp_path / "node"))
    return tmp_path / "node"


@pytest.fixture
def store(s3: str, faults: FaultyServer, request: pytest.FixtureRequest) -> Store:
    """A folder of the test's own on an S3 server."""
    return Store(s3, faults, f"{zlib.crc32(request.node.nodeid.encode())}/data")
