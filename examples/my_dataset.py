"""Train on your own images, in one folder per class, and plot the confusion matrix.

    python examples/my_dataset.py my_photos              # my_photos/cat/1.jpg, my_photos/dog/2.png, ...
    python examples/my_dataset.py my_photos name=large data.image_size=128 model.variant=densenet121

The same command resumes a run that was stopped.
"""

import sys

from densenet_dist import evaluate, fit, load_config

RECIPE = {
    "name": "my-dataset",
    "model": {
        "variant": "densenet",
        "growth_rate": 16,
        "num_layers": [2, 4, 6],
        "compression": 0.5,
    },  # small enough for a CPU
    "data": {"name": "folder", "image_size": 64, "augment": "random_resized_crop", "crop_scale": 0.25},
    "train": {
        "epochs": 30,
        "global_batch_size": 32,
        "lr": 0.05,
        "label_smoothing": 0.1,
        "optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 1e-4},
        "schedule": {"name": "one_cycle", "pct_start": 0.2, "anneal": "linear"},
    },
    "cluster": {"engine": "local"},  # "ray": workers on every GPU of this machine, or of a cluster
}


def main(root: str, *settings: str) -> None:
    """Train on the images in `root`, with changes to the recipe."""
    config = load_config(RECIPE, {"data.root": root}, *settings)
    result = fit(config, resume=True)
    print(result)
    print("validation:", evaluate(result.run, split="val"))
    result.plot_confusion().savefig(f"{result.run}/confusion.png")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
