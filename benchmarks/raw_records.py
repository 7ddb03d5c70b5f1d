"""Whether DALI should decode raw CIFAR records, or be given images that were brought to HWC once, when loaded.

    python benchmarks/raw_records.py --data data --out benchmarks/results/raw_records.json     # --device cuda on a GPU

A record is a label byte and three planes, red, green and blue. "records" gathers records and decodes them in DALI
(slice, reinterpret, transpose); "images" gathers images (H, W, 3), as `densenet_dist.data.dali_loader` does. Both then
warp by the notebook's augmentation and normalise. The two take turns, and medians over the rounds count; all data lie
in memory, on a GPU in its own. One DALI thread.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from densenet_dist.data import augment
from densenet_dist.data.augment import Augmentation
from densenet_dist.data.datasets import load_dataset
from densenet_dist.environment import describe_environment

FORMS = ("records", "images")


def build(form: str, data: Any, matrices: Any, batch_size: int, device: torch.device) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    where, rows = "gpu" if device.type == "cuda" else "cpu", np.random.default_rng(0).permutation(len(data))

    def pick(number: int) -> Any:
        start = number * batch_size % (len(rows) - batch_size)
        return rows[start : start + batch_size]

    def source(number: int) -> Any:
        return data[torch.from_numpy(pick(number)).to(device)] if where == "gpu" else data[pick(number)]

    @pipeline_def(  # type: ignore[untyped-decorator, unused-ignore]  # DALI's, known to mypy or not
        batch_size=batch_size,
        num_threads=1,
        device_id=(device.index or 0) if where == "gpu" else None,
        prefetch_queue_depth=2,
        exec_dynamic=True,
    )
    def pipeline() -> Any:
        layout = "HWC" if form == "images" else ""
        pixels = fn.external_source(source=source, batch=True, device=where, layout=layout)
        matrix = fn.external_source(source=lambda number: matrices[pick(number)], batch=True)
        if form == "records":
            planes = fn.slice(pixels, start=1, shape=3072, axes=[0])
            pixels = fn.transpose(fn.reinterpret(planes, shape=[3, 32, 32], layout="CHW"), perm=[1, 2, 0])
        warped = fn.warp_affine(pixels, matrix=matrix, dtype=types.FLOAT)
        return fn.crop_mirror_normalize(
            warped, dtype=types.FLOAT, output_layout="HWC", mean=[125.0] * 3, std=[63.0] * 3
        )

    return pipeline()


def measure(pipeline: Any, batch_size: int, seconds: float, wait: Callable[[], None]) -> dict[str, float]:
    wait()
    started, worked = time.perf_counter(), time.process_time()
    images = 0
    while time.perf_counter() - started < seconds:
        pipeline.run()
        images += batch_size
    wait()
    return {
        "images_per_s": images / (time.perf_counter() - started),
        "images_per_cpu_s": images / (time.process_time() - worked),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="the folder that holds cifar-10-batches-bin")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    split = load_dataset("cifar10", arguments.data, download=False).train
    images = np.asarray(split.images)
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    held = {"records": np.concatenate([split.labels[:, None].astype(np.uint8), planes], axis=1), "images": images}
    matrices = augment.dali_matrix(augment.draw(Augmentation("notebook"), 0, 0, len(images), 32).affine, 32)
    pipelines = {}
    for form in FORMS:
        data = torch.from_numpy(held[form]).to(device) if device.type == "cuda" else held[form]
        pipelines[form] = build(form, data, matrices, arguments.batch_size, device)
    first = [np.array(pipelines[form].run()[0].as_cpu().as_tensor()) for form in FORMS]
    assert np.array_equal(first[0], first[1]), "both must make the same pixels"
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rounds = [
        {form: measure(pipelines[form], arguments.batch_size, arguments.seconds, wait) for form in FORMS}
        for _ in range(arguments.rounds)
    ]
    summary = {
        form: {key: round(statistics.median(one[form][key] for one in rounds)) for key in rounds[0][form]}
        for form in FORMS
    }
    print(json.dumps(summary, indent=1))
    if arguments.out:
        arguments.out.write_text(
            json.dumps(
                {"summary": summary, "rounds": rounds, "batch_size": arguments.batch_size, **describe_environment()},
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
