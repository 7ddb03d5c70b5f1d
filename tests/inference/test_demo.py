"""``densenet-dist demo`` in a real browser."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from densenet_dist.inference.classifier import load_classifier

pytest.importorskip("gradio", reason="gradio is not installed", exc_type=ImportError)
SECONDS = 570  # below pytest's own limit: until then a busy machine may take its time


@contextmanager
def served(folder: Path, net: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The page's address, and the process that serves it."""
    command = [sys.executable, "-m", "densenet_dist", "demo", str(net), "--port", "0", "--device", "cpu", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TMPDIR": str(folder)}
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder, env=environment
        )
    killer = threading.Timer(SECONDS, process.kill)
    killer.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("open http"), (folder / "errors").read_text()
        yield line.split()[1], process
    finally:
        killer.cancel()
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def browsed(address: str):
    """A page of a browser at that address, and the servers that it asked for anything."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium here")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1000, "height": 640})
        page.set_default_timeout(SECONDS * 1000)
        asked: set[str] = set()
        page.on("request", lambda request: asked.add(urlsplit(request.url).netloc))
        page.goto(address)
        yield page, asked
        browser.close()


def test_a_picture_is_dropped_and_classified(original, tmp_path):
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "x.png")
    (prediction,) = load_classifier(original).predict(tmp_path / "x.png")
    with served(tmp_path, original) as (address, process):
        with browsed(address) as (page, asked):
            page.set_input_files("input[type=file]", tmp_path / "x.png")
            page.get_by_test_id("label-output-value").wait_for()
            shown = page.get_by_test_id("label").inner_text() if page.get_by_test_id("label").count() else ""
            shown = shown or page.locator("body").inner_text()
            for guess in prediction.top:
                assert guess.name in shown
                assert f"{round(guess.probability * 100)}%" in shown
            assert "Test images" in page.locator("body").inner_text()
            assert {host for host in asked if host} == {urlsplit(address).netloc}
            (tmp_path / "bad.png").write_text("no picture")
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0
    assert (tmp_path / "errors").read_text() == ""
    assert not list(tmp_path.glob("densenet_dist-demo-*"))  # nor anything that was uploaded


def test_a_port_that_is_taken(original, command):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = command("demo", original, "--port", str(port))
    assert code == 3
    assert f"port {port} of 127.0.0.1 is taken by another program" in err


def test_without_gradio_the_extra_is_named(original, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = command("demo", original)
    assert code == 3
    assert "pip install 'densenet-dist[demo]'" in err
