"""Serves a page on which pictures can be tried: drop one, see its most probable classes.

    pip install 'densenet-dist[demo]'
    python examples/demo.py runs/k24                    # then open http://127.0.0.1:7860
    python examples/demo.py k24.safetensors --port 8000

The page is for the users of this machine: it listens on 127.0.0.1 and asks for no password. It loads nothing from
elsewhere. Uploads are deleted after ten minutes, and all of them when it ends (Ctrl-C).
"""

import argparse
import os
import tempfile

from PIL import Image, UnidentifiedImageError

from densenet_dist import Classifier, load_classifier
from densenet_dist.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # not EPS, for example, which Pillow hands to Ghostscript
LARGEST_UPLOAD = "20mb"
DELETE_CACHE = (60, 600)  # every minute, what is older than ten


def serve(classifier: Classifier, port: int | None) -> None:
    """Serve the page with Gradio's own checks: it reads and serves nothing but what was uploaded to it."""
    import gradio

    def classify(path: str | None) -> dict[str, float] | None:
        if path is None:
            return None
        try:
            with Image.open(path, formats=FORMATS):
                (prediction,) = classifier.predict(path)
        except (DataError, OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise gradio.Error(f"This picture cannot be used: {type(error).__name__}") from error
        return {guess.name: guess.probability for guess in prediction.top}

    header = classifier.header
    # image_mode=None: the file comes as it was sent, and is decoded as those that the network was trained on.
    picture = gradio.Image(type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Picture")
    page = gradio.Interface(
        classify,
        picture,
        gradio.Label(num_top_classes=5, label="Most probable classes"),
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
    )


def main() -> None:
    """Serve the run or exported file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder, or an exported file")
    parser.add_argument("--port", type=int, help="by default 7860, or the next that is free")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="densenet_dist-demo-") as uploads:
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        serve(load_classifier(arguments.run), arguments.port)


if __name__ == "__main__":
    main()
