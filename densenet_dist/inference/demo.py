"""A page to try a net on: drop a picture, see its most probable classes. It works without a network.

The page is Gradio's, served by this process. It loads nothing from elsewhere: no fonts, no analytics, and a policy that
forbids the browser everything but this server.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from dataclasses import replace
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np

from densenet_dist.config import load_config
from densenet_dist.data.datasets import Dataset
from densenet_dist.data.image_files import ImageFiles
from densenet_dist.errors import ConfigError, DataError, EnvironmentProblem, StorageError
from densenet_dist.inference.classifier import Classifier, exported_file
from densenet_dist.inference.pictures import Unreadable
from densenet_dist.run_folder import CONFIG_FILE
from densenet_dist.train.evaluation import open_run
from densenet_dist.train.inputs import load_dataset_of

LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
MOST_EXAMPLES: Final = 10
_LARGEST_UPLOAD: Final = "50mb"
_POLICY: Final = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)
_STYLE: Final = """
.image-frame img { width: 100% !important; height: 100% !important; object-fit: contain; }
footer { display: none !important; }
"""


def serve(classifier: Classifier, net: str, host: str, port: int, ready: Callable[[str], object]) -> None:
    """Serve the page until Ctrl-C.

    Args:
        net: what the classifier was loaded from; of a run, test images are offered as examples.
        host: whose address to listen on.
        port: 0 for any that is free.
        ready: called with the page's address once somebody can open it.

    Raises:
        EnvironmentProblem: Gradio is missing, or the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="densenet_dist-demo-") as folder:
        gradio = _gradio(Path(folder))
        with _listening(host, port) as listening:
            examples = _examples(net, Path(folder) / "examples")
            app = _application(gradio, classifier, examples, host, folder)
            import uvicorn

            settings = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
            shown = f"[{host}]" if ":" in host else host
            ready(f"http://{shown}:{listening.getsockname()[1]}")
            try:
                uvicorn.Server(settings).run(sockets=[listening])
            except KeyboardInterrupt:
                return


def _gradio(folder: Path) -> Any:
    """Gradio, told before it is imported to send nothing anywhere and to keep uploads in a folder that goes away."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    try:
        return import_module("gradio")
    except ImportError as error:
        raise EnvironmentProblem(
            f"the page needs the package gradio, which is not installed ({error})\n"
            "  install it: pip install 'densenet-dist[demo]'"
        ) from error


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens there, before any work."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise EnvironmentProblem(f"{host} is no address of this machine: {error.strerror or error}") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        taken = error.errno == errno.EADDRINUSE
        what = "is taken by another program" if taken else f"cannot be used: {error.strerror}"
        raise EnvironmentProblem(f"port {port} of {host} {what}; choose another: --port {port + 1}, or 0") from error
    return listening


def _application(gradio: Any, classifier: Classifier, examples: list[str], host: str, folder: str) -> Any:
    """The web application: Gradio's page behind our policy."""
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def forbid_others(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    if host in LOOPBACK:
        # A page elsewhere whose name is made to mean 127.0.0.1 must not reach this server.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]"])
    return gradio.mount_gradio_app(
        app,
        _page(gradio, classifier, examples),
        path="/",
        server_name=host,
        allowed_paths=[folder],
        max_file_size=_LARGEST_UPLOAD,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        footer_links=[],
        theme=_theme(gradio),
        css=_STYLE,
    )


def _theme(gradio: Any) -> Any:
    """Gradio's own look in the fonts that the reader's system has."""
    return gradio.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="blue"
    )


def _page(gradio: Any, classifier: Classifier, examples: list[str]) -> Any:
    header = classifier.header

    def classify(path: str | None) -> dict[str, float] | None:
        if path is None:
            return None
        (found,) = classifier.stream([path])
        if isinstance(found, Unreadable):
            raise gradio.Error(f"This picture cannot be used: {found.reason}", duration=None)
        return {guess.name: guess.probability for guess in found.top}

    size, count = header.image_size, len(header.class_names)
    said = f"trained on {header.data} · {count:,} classes · sees {size} x {size} pixels · {header.checkpoint}"
    with gradio.Blocks(title=f"{header.run} - densenet_dist", analytics_enabled=False) as page:
        gradio.HTML(f"<h1 style='margin:0'>{escape(header.run)}</h1><p style='margin:0'>{escape(said)}</p>")
        with gradio.Row():
            # image_mode=None: the file comes as it was sent, and is decoded as those that the net was trained on.
            picture = gradio.Image(
                type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Picture", height=320
            )
            answer = gradio.Label(num_top_classes=5, label="Most probable classes")
        picture.change(classify, picture, answer, show_progress="minimal", api_name="predict")
        if examples:
            gradio.Examples(examples, picture, label="Test images", examples_per_page=MOST_EXAMPLES)
    return page


def _examples(net: str, folder: Path) -> list[str]:
    """Test images of a run's data set as files, of as many classes as there is room for; none where it is not there."""
    if exported_file(net) is not None:
        return []
    config = load_config(open_run(net).fetch(CONFIG_FILE))
    try:
        dataset = load_dataset_of(replace(config, data=replace(config.data, download=False, on_bad_image="skip")))
    except (DataError, StorageError, ConfigError):
        return []
    folder.mkdir()
    return [_saved(dataset, place, folder) for place in _one_of_each(dataset)]


def _one_of_each(dataset: Dataset) -> list[int]:
    """Places in the test split of the first image of each class, of classes spread evenly over all."""
    present, first = np.unique(dataset.test.labels, return_index=True)
    count = min(MOST_EXAMPLES, len(present))
    places: list[int] = first[np.arange(count) * len(present) // count].tolist()
    return places


def _saved(dataset: Dataset, place: int, folder: Path) -> str:
    images = dataset.test.images
    if isinstance(images, ImageFiles):
        source = images.path(place)
        return shutil.copyfile(source, folder / f"{place}{source.suffix.lower()}").as_posix()
    from PIL import Image

    path = folder / f"{place}.png"
    Image.fromarray(images[place]).save(path)
    return path.as_posix()
