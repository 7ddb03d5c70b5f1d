"""examples/demo.py: it classifies what is uploaded, and neither reads nor serves any other file."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image, ImageOps

from densenet_dist.inference.classifier import load_classifier

pytest.importorskip("gradio", reason="gradio is not installed", exc_type=ImportError)
DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


@pytest.fixture(scope="module")
def address(original, tmp_path_factory) -> Iterator[str]:
    """Of Gradio's interface for programs, on a page of the run."""
    folder = tmp_path_factory.mktemp("demo")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TMPDIR": str(folder)}
    command = [sys.executable, "-u", str(DEMO), str(original)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment) as process:
        try:
            assert process.stdout is not None
            first = next(line for line in process.stdout if "http" in line)
            yield f"{first.split()[-1]}/gradio_api"
            process.send_signal(signal.SIGINT)
            assert process.wait(300) == 0
        finally:
            process.kill()
    assert list(folder.iterdir()) == []  # nothing that was uploaded is left


def upload(address: str, name: str, content: bytes) -> str:
    """Where the server keeps the file."""
    answer = requests.post(f"{address}/upload", files={"files": (name, content)}, timeout=60)
    answer.raise_for_status()
    (path,) = answer.json()
    return str(path)


META = {"meta": {"_type": "gradio.FileData"}}


def classify(address: str, picture: dict[str, Any]) -> str:
    """What the server says of a picture: its last event."""
    call = requests.post(f"{address}/call/predict", json={"data": [picture]}, timeout=60).json()["event_id"]
    return requests.get(f"{address}/call/predict/{call}", timeout=60).text


def test_an_upload_is_classified(address, original):
    picture = Image.merge("LA", [Image.new("L", (256, 256)), Image.linear_gradient("L")])  # the shape is in alpha alone
    file = io.BytesIO()
    picture.save(file, "PNG")
    answer = classify(address, {"path": upload(address, "x.png", file.getvalue())} | META)
    assert answer.startswith("event: complete")
    found, heat = json.loads(answer.partition("data: ")[2])
    classifier, image = load_classifier(original, device="cpu"), ImageOps.invert(Image.linear_gradient("L"))
    (wanted,) = classifier.predict(image)
    shown = Image.open(io.BytesIO(requests.get(f"{address}/file={heat['path']}", timeout=60).content))
    assert shown.convert("RGB").tobytes() == classifier.heat_map(image, wanted.top[0].label).tobytes()
    assert [item["label"] for item in found["confidences"]] == [guess.name for guess in wanted.top]
    assert found["confidences"][0]["confidence"] == pytest.approx(wanted.top[0].probability)


def test_no_other_file_can_be_read(address, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    inline = f"data:image/png;base64,{base64.b64encode((tmp_path / 'x.png').read_bytes()).decode()}"
    paths = ("/etc/hostname", "/dev/zero", str(tmp_path / "x.png"), f"{address}/x.png")
    others = {"path": str(tmp_path / "x.png")}, {"path": None, "url": inline} | META
    for picture in (*({"path": path} | META for path in paths), *others):
        answer = classify(address, picture)
        assert answer.startswith("event: error"), picture
        for name in (picture["path"], answer.partition("data: ")[2].strip().strip('"')):
            assert requests.get(f"{address}/file={name}", timeout=60).status_code in (403, 404)


def test_uploads_are_bounded_never_shown_as_pages_and_opened_as_photos_only(address):
    too_large = requests.post(f"{address}/upload", files={"files": ("x.png", bytes(21 << 20))}, timeout=60)
    assert too_large.status_code == 413
    assert requests.post(f"{address}/upload", data=iter([b"of any length"]), timeout=60).status_code == 413
    for name, page in (
        ("x.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"),
        ("x.html", b"<script>alert(1)</script>"),
    ):
        path = upload(address, name, page)
        for headers in ({}, {"Range": "bytes=0-99"}):
            shown = requests.get(f"{address}/file={path}", headers=headers, timeout=60)
            assert shown.headers["content-disposition"].startswith("attachment")
            assert shown.headers["content-type"] == "application/octet-stream"
    for name in ("x.png", "x.eps"):
        assert classify(address, {"path": upload(address, name, POSTSCRIPT)} | META).startswith("event: error")


def test_the_oldest_uploads_make_room_for_new_ones(tmp_path, monkeypatch):
    demo = runpy.run_path(str(DEMO))
    limits = demo["BoundedUploads"].__call__.__globals__
    monkeypatch.setitem(limits, "LARGEST_TOTAL", 10_000)
    monkeypatch.setitem(limits, "SMALLEST_COUNTED", 100)

    async def app(upload: Any, receive: Any, send: Any) -> None:
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 10_000 - upload["size"]
        (tmp_path / upload["name"]).write_bytes(bytes(upload["size"]))
        os.utime(tmp_path / upload["name"], (upload["time"], upload["time"]))

    bounded = demo["BoundedUploads"](app, tmp_path)
    for time, (name, size) in enumerate([("a", 4000), ("b", 4000), ("c", 10), ("d", 4000)]):
        scope = {"type": "http", "method": "POST", "headers": [(b"content-length", b"%d" % size)]}
        asyncio.run(bounded(scope | {"name": name, "size": size, "time": time}, None, None))
    assert {path.name for path in tmp_path.iterdir()} == {"b", "c", "d"}
