"""examples/demo.py: it classifies what is uploaded, and neither reads nor serves any other file."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from PIL import Image, ImageOps

from densenet_dist.inference.classifier import Classifier, load_classifier

pytest.importorskip("gradio", reason="gradio is not installed", exc_type=ImportError)
DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
SECONDS = 300


@pytest.fixture(scope="module")
def classifier(original) -> Classifier:
    return load_classifier(original, device="cpu")


@pytest.fixture(scope="module")
def address(original, tmp_path_factory) -> Iterator[str]:
    """Of Gradio's interface for programs, on a page of the run."""
    folder = tmp_path_factory.mktemp("demo")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TMPDIR": str(folder)}
    command = [sys.executable, "-u", str(DEMO), str(original)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment) as process:
        killer = threading.Timer(SECONDS, process.kill)
        killer.start()
        try:
            assert process.stdout is not None
            first = next(line for line in process.stdout if "http" in line)
            yield f"{first.split()[-1]}/gradio_api"
            process.send_signal(signal.SIGINT)
            assert process.wait(SECONDS) == 0
        finally:
            killer.cancel()
            process.kill()
    assert list(folder.iterdir()) == []  # nothing that was uploaded is left


def upload(address: str, name: str, content: bytes) -> str:
    """Where the server keeps the file."""
    answer = requests.post(f"{address}/upload", files={"files": (name, content)}, timeout=60)
    answer.raise_for_status()
    (path,) = answer.json()
    return str(path)


def classify(address: str, path: str) -> str:
    """What the server says of a file: its last event."""
    data = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}
    call = requests.post(f"{address}/call/predict", json=data, timeout=60).json()["event_id"]
    return requests.get(f"{address}/call/predict/{call}", timeout=60).text


def test_an_upload_is_classified(address, classifier):
    picture = Image.merge("LA", [Image.new("L", (256, 256)), Image.linear_gradient("L")])  # the shape is in alpha alone
    file = io.BytesIO()
    picture.save(file, "PNG")
    answer = classify(address, upload(address, "x.png", file.getvalue()))
    assert answer.startswith("event: complete")
    (found,) = json.loads(answer.partition("data: ")[2])
    (wanted,) = classifier.predict(ImageOps.invert(Image.linear_gradient("L")))
    assert [item["label"] for item in found["confidences"]] == [guess.name for guess in wanted.top]
    assert found["confidences"][0]["confidence"] == pytest.approx(wanted.top[0].probability)


def test_no_other_file_can_be_read(address):
    for path in ("/etc/hostname", str(DEMO)):
        answer = classify(address, path)
        assert answer.startswith("event: error")
        for name in (path, answer.partition("data: ")[2].strip().strip('"')):
            assert requests.get(f"{address}/file={name}", timeout=60).status_code in (403, 404)


def test_uploads_are_bounded_never_shown_as_pages_and_opened_as_photos_only(address):
    too_large = requests.post(f"{address}/upload", files={"files": ("x.png", bytes(21 << 20))}, timeout=60)
    assert too_large.status_code == 413
    path = upload(address, "x.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    shown = requests.get(f"{address}/file={path}", timeout=60)
    assert shown.headers["content-disposition"].startswith("attachment")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    assert classify(address, upload(address, "x.png", postscript)).startswith("event: error")
