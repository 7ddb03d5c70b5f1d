"""Measure what a large sweep costs beside training, with synthetic records on the local disk.

python benchmarks/sweep_scale.py                # events, files and page of 500 trials x 100 epochs
python benchmarks/sweep_scale.py --resume       # resume a sweep of 100 ended trials x 20 epochs
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time

from densenet_dist.run_folder import RunFolder
from densenet_dist.sweep.definition import Sweep, load_sweep
from densenet_dist.sweep.results import State, Trial, TrialFile, add_epoch, format_results
from densenet_dist.sweep.space import sample

SPACE = (
    "space.train.lr={loguniform: [0.001, 1]}",
    "space.model.drop_rate={uniform: [0, 0.3]}",
    "space.model.growth_rate=[8, 12, 16]",
    "space.train.schedule.name=[one_cycle, cosine, constant]",
)


def record_of(epoch: int, level: float) -> dict[str, float]:
    figures = {
        f"{split}/{name}": level - level / (epoch + 1)
        for split in ("train", "val")
        for name in ("loss", "top1", "top5")
    }
    return {"epoch": epoch, "global_step": 100 * epoch, "seconds": 2.5, **figures}


def measure_page(sweep: Sweep, folder: RunFolder, trials: int, epochs: int) -> None:
    from densenet_dist.sweep.page import write_page

    rng, records = random.Random(0), []
    for i in range(trials):
        trial, level = Trial(f"trial-{i:03d}", sample(sweep.space, rng), "finished"), rng.random()
        for epoch in range(1, epochs + 1):
            add_epoch(trial, record_of(epoch, level), sweep.settings.metric, sweep.settings.maximize)
        records.append(trial)
    before = time.process_time()
    write_page(folder, sweep, records)
    seconds, peak = time.process_time() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"page: {seconds:.2f} CPU-s, {(folder.path / 'sweep.html').stat().st_size / 1e6:.1f} MB, peak {peak:.0f} MiB")


def measure_events(sweep: Sweep, folder: RunFolder, trials: int, epochs: int) -> None:
    from densenet_dist.cluster.sweep import SweepRecord

    rng, slowest, started = random.Random(0), 0.0, time.process_time()
    levels = [(f"trial-{i:03d}", sample(sweep.space, rng), rng.random()) for i in range(trials)]
    with SweepRecord(folder, sweep, lambda event: None) as record:
        for epoch in range(1, epochs + 1):
            state: State = "epoch" if epoch < epochs else "finished"
            for name, overrides, level in levels:
                before = time.perf_counter()
                record.update(name, overrides, state, record_of(epoch, level))
                slowest = max(slowest, time.perf_counter() - before)
    seconds = time.process_time() - started
    print(f"events: {seconds:.1f} CPU-s for {trials * epochs}; the longest took {1000 * slowest:.1f} ms")
    before = time.process_time()
    format_results(sweep, record.trials)
    print(f"sweep.json and best.yaml: {time.process_time() - before:.2f} CPU-s")


def measure_resume(sweep: Sweep, folder: RunFolder, trials: int, epochs: int) -> None:
    from densenet_dist.cluster.sweep import open_sweep, tune

    rng = random.Random(0)
    folder.write("sweep.yaml", sweep.to_yaml())
    for i in range(trials):
        run, level = RunFolder(sweep.folder, f"trial-{i:03d}"), rng.random()
        TrialFile(sample(sweep.space, rng), "stopped").write(run)
        run.write("config.yaml", "")
        run.write(
            "metrics.jsonl", "".join(json.dumps(record_of(epoch, level)) + "\n" for epoch in range(1, epochs + 1))
        )
    before = time.perf_counter()
    tune(open_sweep(folder.location), resume=True, listener=lambda event: None)
    print(f"resuming {trials} ended trials x {epochs} epochs: {time.perf_counter() - before:.1f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--resume", action="store_true")
    resumes = parser.parse_args().resume
    trials, epochs = (100, 20) if resumes else (500, 100)
    with tempfile.TemporaryDirectory() as storage:
        sweep = load_sweep(*SPACE, f"trials={trials}", f"train.epochs={epochs}", "name=large", f"storage={storage}")
        folder = RunFolder(storage, "large")
        folder.create()
        for measure in [measure_resume] if resumes else [measure_page, measure_events]:
            measure(sweep, folder, trials, epochs)
