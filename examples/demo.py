"""Serve a page that classifies images, and shows which regions support the most probable class.

    pip install '.[demo]'
    python examples/demo.py runs/k24                    # then open http://127.0.0.1:7860
    python examples/demo.py k24.safetensors --port 8000

The page is for the users of this machine: it listens on 127.0.0.1 and asks for no password. It loads nothing from
other servers. Uploads are deleted after ten minutes, the oldest ones earlier if they exceed 200 MB together, and all of
them when the program ends (Ctrl-C).
"""

import argparse
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from densenet_dist import Classifier, load_classifier
from densenet_dist.inference.images import Unreadable

LARGEST_UPLOAD = 20 << 20
LARGEST_TOTAL = 200 << 20
SMALLEST_COUNTED = 64 << 10  # many small files fill a disk too
DELETE_CACHE = (60, 600)  # every minute, files older than ten minutes


class BoundedUploads:
    """ASGI middleware that refuses large requests, and deletes the oldest uploads to keep the total below a limit."""

    def __init__(self, app: Any, folder: Path) -> None:
        self._app, self._folder, self._coming = app, folder, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request."""
        if scope["type"] != "http" or scope["method"] == "GET":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        size = int(headers.get(b"content-length", 0))
        if size > LARGEST_UPLOAD or self._coming + size > LARGEST_TOTAL or b"transfer-encoding" in headers:
            await send({"type": "http.response.start", "status": 413, "headers": []})
            await send({"type": "http.response.body", "body": b"at most %d bytes at a time" % LARGEST_UPLOAD})
            return
        self._coming += size
        try:
            self._make_room(LARGEST_TOTAL - self._coming)
            await self._app(scope, receive, send)
        finally:
            self._coming -= size

    def _make_room(self, room: int) -> None:
        found = []
        for path in self._folder.rglob("*"):
            with suppress(FileNotFoundError):
                about = path.stat()
                found.append((about.st_mtime, path, max(about.st_size, SMALLEST_COUNTED)))
        total = sum(size for _, _, size in found)
        for _, path, size in sorted(found):
            if total <= room:
                return
            with suppress(OSError):  # a folder that is not empty
                path.rmdir() if path.is_dir() else path.unlink()
                total -= size


def serve(classifier: Classifier, port: int | None, uploads: Path) -> None:
    """Serve the page; it reads and serves only uploaded files."""
    import gradio  # creates its folders when it is imported
    from starlette.middleware import Middleware

    async def uploaded(path: str) -> str:
        """Return a request's `path`, which Gradio has checked to be an upload; Gradio would also download addresses."""
        if not os.path.isfile(path):
            raise gradio.Error("This image is no longer available: upload it again")
        return path

    def classify(path: str | None) -> tuple[dict[str, float] | None, Any]:
        if path is None:
            return None, None
        (found,) = classifier.stream([path])
        if isinstance(found, Unreadable):
            raise gradio.Error(f"This image cannot be used: {found.reason}")
        return {each.name: each.probability for each in found.top}, classifier.heat_map(path, found.top[0].label)

    picture = gradio.Image(sources=["upload", "clipboard"], label="Image")
    # Gradio's own code for images lets a request without `meta` name any file, and opens every format that Pillow
    # knows, some of them with Ghostscript. For `FileData` it insists on an upload, and the path is all that is needed.
    picture.data_model = gradio.FileData
    picture.preprocess = lambda payload: payload and payload.path
    picture.async_move_resource_to_block_cache = uploaded
    header = classifier.header
    page = gradio.Interface(
        classify,
        picture,
        [
            gradio.Label(num_top_classes=5, label="Most probable classes"),
            gradio.Image(label="Regions that support the first class (Grad-CAM)", format="png", interactive=False),
        ],
        title=f"{header.run}: {len(header.class_names)} classes of {header.data}",
        api_name="predict",
        flagging_mode="never",
        delete_cache=DELETE_CACHE,
    )
    page.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        allowed_paths=[],
        max_file_size=LARGEST_UPLOAD,
        ssr_mode=False,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        app_kwargs={"middleware": [Middleware(BoundedUploads, uploads)]},
    )


def main() -> None:
    """Serve the run or export that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a run, or a safetensors export")
    parser.add_argument("--port", type=int, help="default: 7860, or the next free port")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="densenet_dist-demo-") as uploads:
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        serve(load_classifier(arguments.run), arguments.port, Path(uploads))


if __name__ == "__main__":
    main()
