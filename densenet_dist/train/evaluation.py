"""Judge a finished run again: its best or last checkpoint on any split."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from densenet_dist.config import load_config
from densenet_dist.errors import CheckpointError, StorageError
from densenet_dist.schema import Config
from densenet_dist.train.checkpoint import CheckpointStore, load_weights
from densenet_dist.train.context import LocalContext, choose_device
from densenet_dist.train.engine import evaluate_model
from densenet_dist.train.inputs import engine_of, eval_loader, load_dataset_of, train_and_val
from densenet_dist.train.job import build_model
from densenet_dist.train.run_folder import CONFIG_FILE, RunFolder, split_location


def open_run(run: str | Path) -> RunFolder:
    """The folder of an existing run.

    Args:
        run: its path or URI, or its name under ``runs/``.

    Raises:
        StorageError: where there is no run.
    """
    text = str(run)
    if "://" in text:
        folder = RunFolder(*split_location(text))
    else:
        path = Path(text).expanduser()
        if not (path / CONFIG_FILE).exists() and (Path("runs") / path / CONFIG_FILE).exists():
            path = Path("runs") / path
        path = path.absolute()
        folder = RunFolder(str(path.parent), path.name)
    if not folder.exists():
        raise StorageError(f"there is no run at {folder.uri}: it has no {CONFIG_FILE}")
    return folder


def evaluate(
    run: str | Path,
    *,
    split: Literal["test", "val", "train"] = "test",
    checkpoint: Literal["best", "last"] = "best",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    overrides: tuple[str, ...] = (),
) -> dict[str, float]:
    """Loss, top-1 and top-5 of a run's checkpoint, every image seen once, unaugmented.

    Args:
        run: its folder (path or URI), or its name under ``runs/``.
        split: which images; val and train are the parts that the run itself used.
        checkpoint: best (by ``checkpoint.monitor``) or last.
        device: auto takes a GPU if there is one.
        overrides: changes to the run's configuration, such as ``data.root=...``.

    Returns:
        ``loss``, ``top1``, ``top5`` (shares in [0, 1]) and ``images``.

    Raises:
        StorageError, CheckpointError, DataError, EnvironmentProblem: as their names say.
    """
    folder = open_run(run)
    config: Config = load_config(folder.fetch(CONFIG_FILE), *overrides)
    store = CheckpointStore(folder)
    snapshot = store.load_best() if checkpoint == "best" else store.load_latest()
    if snapshot is None:
        raise CheckpointError(f"the run {folder.uri} has no checkpoint yet")
    context = LocalContext(folder, choose_device(device))
    dataset = load_dataset_of(config)
    model = build_model(config.model, dataset.num_classes, dataset.image_size)
    load_weights(model, snapshot.average or snapshot.model, f"the checkpoint of {folder.uri}")
    train, val = train_and_val(config, dataset)
    parts = {"test": (dataset.test, None), "val": (dataset.train, val), "train": (dataset.train, train)}
    images, indices = parts[split]
    # One pass is not worth a measurement: torch needs none of DALI's imports.
    engine = engine_of(config, context.device, dataset, images, "dali" if config.data.loader == "dali" else "torch")
    loader = eval_loader(config, context, images, engine, indices)
    return evaluate_model(model.to(context.device), loader, context.device, config.train.precision)
