"""What Ray costs: the same one-worker run without it and under it, in turn; steady-state images/s and whole time.

    python benchmarks/ray_overhead.py --pairs 3 --out benchmarks/results/ray_overhead.json

The worker has one torch thread unless other settings are given: with a thread on every core, what is measured is how
Ray's own processes share them. Each run is a process of its own. Steady state is the median over its epochs but the
first, which warms up.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from densenet_dist.environment import describe_environment

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def measure(engine: str, folder: Path, settings: list[str]) -> dict[str, float]:
    """Images/s in steady state and seconds from start to end of one run."""
    command = [sys.executable, "-m", "densenet_dist", "train", str(CONFIG), f"cluster.engine={engine}",
               "cluster.workers=1", f"storage={folder}", f"name={engine}", "--quiet", *settings]  # fmt: skip
    started = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - started
    records = map(json.loads, (folder / engine / "metrics.jsonl").read_text().splitlines())
    rates = [record["perf/images_per_s"] for record in records if "perf/images_per_s" in record]
    return {"images_per_s": statistics.median(rates[1:]), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "settings", nargs="*", default=["train.epochs=6", "data.limit=3000", "cluster.cpus_per_worker=1"]
    )
    arguments = parser.parse_args()
    pairs = []
    for number in range(arguments.pairs):
        with tempfile.TemporaryDirectory() as folder:
            # Alternating which goes first keeps a drift of the machine out of the ratio.
            engines = ("local", "ray") if number % 2 == 0 else ("ray", "local")
            pairs.append({engine: measure(engine, Path(folder), arguments.settings) for engine in engines})
        print(json.dumps(pairs[-1]), flush=True)
    ratios = [pair["ray"]["images_per_s"] / pair["local"]["images_per_s"] for pair in pairs]
    extra = [pair["ray"]["seconds"] - pair["local"]["seconds"] for pair in pairs]
    result = {
        "settings": arguments.settings,
        "pairs": pairs,
        "ratio_images_per_s": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "extra_seconds_a_run": statistics.median(extra),
        "environment": describe_environment(),
    }
    print(f"images/s under Ray / without: median {result['ratio_images_per_s']['median']:.3f} "
          f"({min(ratios):.3f} to {max(ratios):.3f}); {result['extra_seconds_a_run']:.1f} s more a run")  # fmt: skip
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
