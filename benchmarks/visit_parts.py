"""The parts of a visit to a GPU (visit.py), each run in a process of its own.

    python benchmarks/visit_parts.py PART OUT.json SECONDS [--small]

A part prints what a person reads, and writes its figures to OUT.json as it gets them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/model/test_kernels.py", "tests/train/test_loop.py", "tests/data/test_torch_loader.py")


def smoke(small: bool, out: Path, seconds: float) -> None:
    from training_step import VARIANTS, TrainingStep

    from densenet_dist.environment import describe_environment

    about = describe_environment()
    if find_spec("triton"):
        import triton

        about["packages"]["triton"] = triton.__version__
    print(
        f"{about['packages']}, Python {about['python']}, CUDA {about['cuda']}, cuDNN {about['cudnn']}, {about['cpu']}"
    )
    if not small:
        print(torch.cuda.get_device_properties(0))
    config, device = configuration(small, "model.num_layers=[2,2]", "train.precision=fp32")
    losses = {
        name: TrainingStep(VARIANTS[name], config, 10, device).measure(16, 0).loss for name in ("reference", "fused")
    }
    out.write_text(json.dumps({**about, "losses": losses}, indent=1))
    print(f"loss of the first step: {losses}")
    if abs(losses["fused"] / losses["reference"] - 1) > 5e-3:  # of convolutions in TF32
        raise SystemExit("the fused form gives another loss than the reference form")


def ceilings(small: bool, out: Path, seconds: float) -> None:
    from roofline import peaks

    device = configuration(small)[1]
    found = {}
    for precision in ("bf16", "fp32"):
        found[f"{precision} TFLOP/s"], found["copy GB/s"] = peaks(device, precision, 0.1 if small else 2.0)
        print(f"{precision} matrix product: {found[f'{precision} TFLOP/s']:.1f} TFLOP/s (fp32 is TF32 on a GPU)")
    print(f"copy: {found['copy GB/s']:.0f} GB/s, read and written")
    out.write_text(json.dumps(found, indent=1))
    values, count = torch.zeros(1024, device=device), 100 if small else 2000

    def launch() -> None:
        for _ in range(count):
            values.add_(1)

    found["launched us"] = 1e6 * seconds_of(launch, device) / count
    print(f"{count} small kernels launched one by one: {found['launched us']:.2f} us per kernel")
    if not small:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        found["graph us"] = 1e6 * seconds_of(graph.replay, device) / count
        print(f"{count} small kernels in a CUDA graph: {found['graph us']:.2f} us per kernel")
    out.write_text(json.dumps(found, indent=1))


def seconds_of(work: Callable[[], object], device: Any) -> float:
    """The shortest of five calls."""
    from densenet_dist.train.autotune import synchronize

    taken = []
    for _ in range(6):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def tests(small: bool, out: Path, seconds: float) -> None:
    end = time.monotonic() + seconds - 15
    if not find_spec("pytest"):
        raise SystemExit("pytest is not installed: no test was run")
    # The conftest.py files import the servers and packages of other tests; no plug-in is needed.
    pytest = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-o", "addopts=", "--import-mode=importlib"]
    pytest += ["-p", "no:cacheprovider", "-rfE", "--tb=short"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    chosen = (*TESTS, "-m", "gpu")
    if small:  # one test runs in Triton's interpreter; those that need a GPU are collected and skipped
        environment["TRITON_INTERPRET"] = "1"
        chosen = (*TESTS, "-k", "variance_survives or captured_steps or TestGpu")
    listed = subprocess.run([*pytest, *chosen, "--collect-only"], env=environment, capture_output=True, text=True)
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    if listed.returncode or not names:
        raise SystemExit(f"the tests cannot be collected:\n{listed.stdout[-3000:]}{listed.stderr[-1000:]}")
    count = min(8, len(os.sched_getaffinity(0)))
    logs = [out.with_name(f"tests-{index}.txt") for index in range(count)]
    processes = []
    for index, log in enumerate(logs):
        with open(log, "w", encoding="utf-8") as sink:
            left = f"{max(1.0, end - time.monotonic()):.0f}"  # pytest reports what it has found when it is interrupted
            command = ["timeout", "--foreground", "-s", "INT", "-k", "5", left, *pytest, *names[index::count]]
            processes.append(subprocess.Popen(command, env=environment, stdout=sink, stderr=subprocess.STDOUT))
    codes = [process.wait() for process in processes]
    text = "".join(log.read_text() for log in logs)
    found: dict[str, Any] = {"collected": len(names), "exit codes": codes}
    for number, outcome in re.findall(r"(\d+) (passed|failed|skipped|error)", text):
        found[outcome] = found.get(outcome, 0) + int(number)
    out.write_text(json.dumps(found, indent=1))
    print(found, *re.findall(r"^(?:FAILED|ERROR) .*", text, re.MULTILINE)[:20], sep="\n")
    raise SystemExit(any(codes))


def profile(small: bool, out: Path, seconds: float) -> None:
    from measuring import print_table
    from torch.profiler import ProfilerActivity
    from training_step import VARIANTS, TrainingStep

    config, device = configuration(small)
    activity, kind = (ProfilerActivity.CPU, "CPU") if small else (ProfilerActivity.CUDA, "CUDA")
    steps, found = 5, {}
    for batch_size in (4, 8) if small else (64, 256):
        step = TrainingStep(VARIANTS["fused" if small else "graph"], config, 10, device).prepare(batch_size)
        step()
        with torch.profiler.profile(activities=[activity], acc_events=True) as profiler:
            for _ in range(steps):
                step()
            if not small:
                torch.cuda.synchronize()
        kernels = [event for event in profiler.key_averages() if event.device_type.name == kind]
        times = [(e.self_cpu_time_total if small else e.self_device_time_total) / steps for e in kernels]
        rows = sorted(((us, e.count / steps, e.key) for us, e in zip(times, kernels, strict=True)), reverse=True)
        if not rows:
            raise SystemExit("the profiler has recorded no kernels")
        found[batch_size] = rows
        out.write_text(json.dumps(found, indent=1))
        print_table(
            f"batch {batch_size}: {sum(times) / 1e3:.3f} ms in {sum(row[1] for row in rows):.0f} kernels per step",
            ["kernel", "calls", "us", "share"],
            [[name[:70], f"{n:.0f}", f"{us:.1f}", f"{us / sum(times):.1%}"] for us, n, name in rows[:12]],
        )


def model(small: bool, out: Path, seconds: float) -> None:
    from model import measure, print_rows

    variants = ("padded", "fused", "graph")
    found = json.loads(out.read_text()) if out.exists() else []
    found = [one for one in found if not any(row["note"] for row in one["rows"])]
    for batch_size in (4, 8) if small else (64, 256, 1024):
        if any(row["batch_size"] == batch_size for one in found for row in one["rows"]):
            continue
        seconds, rounds = (0.01, 1) if small else (0.5, 3)
        config = configuration(small)[0]
        found.append(measure(config, variants=variants, batch_sizes=[batch_size], seconds=seconds, rounds=rounds))
        out.write_text(json.dumps(found, indent=1))
        print_rows(found[-1])
    failed = [row["note"] for one in found for row in one["rows"] if row["note"]]
    raise SystemExit(bool(failed))


def configuration(small: bool, *settings: str) -> tuple[Any, Any]:
    """The notebook's network in bfloat16 on a GPU, without dropout; or a small one on the CPU."""
    from densenet_dist.config import load_config

    device = "cpu" if small else "cuda"
    size = ("model.num_layers=[1,1]", "model.growth_rate=4", "train.precision=fp32") if small else ()
    where = (f"cluster.device={device}", "train.precision=bf16", "model.drop_rate=0")
    path = str(ROOT / "configs/cifar10_notebook.yaml")
    torch.backends.cudnn.benchmark = True  # as training does
    return load_config(path, *where, *size, *settings), torch.device(device)


def convolutions(small: bool, out: Path, seconds: float) -> None:
    from convolutions import main

    of_a_gpu = ("--batches", "256", "--sides", "32", "16", "--made", "40", "--rounds", "3")
    of_a_cpu = (
        "--batches",
        "1",
        "--sides",
        "4",
        "--made",
        "40",
        "--channels",
        "40",
        "--rounds",
        "1",
        "--device",
        "cpu",
    )
    main([*(of_a_cpu if small else of_a_gpu), "--minutes", f"{(seconds - 15) / 60:.2f}", "--out", str(out)])


def hopper(small: bool, out: Path, seconds: float) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks/hopper"))
    from fprop import main

    main(["--out", str(out)])


if __name__ == "__main__":
    globals()[sys.argv[1]]("--small" in sys.argv, Path(sys.argv[2]), float(sys.argv[3]))
