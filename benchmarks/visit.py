"""Everything that this project wants measured on a GPU, in parts of some minutes, going on where the last part ended.

    python benchmarks/visit.py --data CIFAR --out results --minutes 9     # again and again, until it says "all done"
    python benchmarks/visit.py --out results --table                      # what is measured so far, as Markdown

CIFAR is the folder that holds ``cifar-10-batches-bin`` and ``cifar-100-binary``. Run folders, with their checkpoints,
are in ``runs/visit``; what is worth keeping is copied to ``--out`` after every step. Training is stopped by SIGINT when
the time is up, and goes on with ``--resume``. ``--small`` takes the same way on a CPU, with nets of two layers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "densenet_dist"]
KEPT = ("config.yaml", "env.json", "metrics.jsonl", "summary.json", "report.html")
SMALL = (
    *("data.limit=256", "model.num_layers=[1,1]", "model.depth=null", "model.growth_rate=4", "cluster.device=cpu"),
    *("train.precision=fp32", "train.global_batch_size=64", "train.epochs=2", "train.schedule.name=constant"),
    *("train.schedule.warmup_epochs=0", "cluster.engine=local"),
)
INTERRUPTED = 130


@dataclass(frozen=True)
class Step:
    """One measurement.

    Attributes:
        name: of the step, its run and its files.
        kind: once (the whole command, or nothing), train (goes on with --resume) or seeds (time_to_accuracy.py).
        arguments: of the command.
        minutes: that it takes at most; of the other kinds, those with which it is worth beginning.
        shows: what it should show.
    """

    name: str
    kind: str
    arguments: tuple[str, ...]
    minutes: float
    shows: str


def _train(name: str, config: str, shows: str, *settings: str) -> Step:
    return Step(name, "train", (f"configs/{config}.yaml", *settings), 2, shows)


def _seeds(name: str, config: str, targets: str, seeds: int, shows: str, *settings: str) -> Step:
    options = ("--targets", targets, "--seeds", str(seeds))
    return Step(name, "seeds", (f"configs/{config}.yaml", *settings, *options), 2, shows)


def _bench(name: str, what: str, config: str, minutes: float, shows: str, *rest: str) -> Step:
    return Step(name, "once", ("bench", what, f"configs/{config}.yaml", *rest), minutes, shows)


_PRECISION = ("train.epochs=30", "train.schedule.milestones=[15,22]", "train.global_batch_size=256", "train.lr=2e-3")
STEPS = (
    Step("doctor", "once", ("doctor", "cluster.device=cuda"), 1, "GPU, driver, DALI and Ray are found"),
    Step("tests", "once", ("pytest", "-m", "gpu", "-q"), 9, "the tests marked gpu pass"),
    _train("quickstart", "quickstart", "above 90 % through Ray Train, on every GPU"),
    _train("notebook10", "cifar10_notebook", "test top-1 against 92.66 %, time against 12,432 s"),
    _train("notebook100", "cifar100_notebook", "test top-5 against 88.44 %, time against 13,755 s"),
    _seeds("fast9266", "cifar10_fast", "92.66", 5, "92.66 % in 60 s"),
    _seeds("fast94", "cifar10_fast", "94", 5, "94 % in 120 s", "train.epochs=24"),
    _train("best10", "cifar10_best", "96 % test top-1"),
    _train("best100", "cifar100_best", "95 % test top-5, 79 % top-1"),
    *(
        _train(
            f"{precision}-{seed}",
            "cifar10_notebook",
            "the same accuracy in fp32, bf16 and fp16, within that of seeds",
            *(f"train.precision={precision}", f"seed={seed}", *_PRECISION),
        )
        for seed in range(3)
        for precision in ("fp32", "bf16", "fp16")
    ),
    _bench("loaders", "data", "cifar10_notebook", 6, "150,000 augmented images/s at batch 512", "cluster.device=cuda"),
    _bench(
        *("model", "model", "cifar10_notebook", 9, "the fused block beside the reference: speed, memory"),
        *("cluster.device=cuda", "train.precision=bf16", "model.drop_rate=0"),
        *("--variants", "reference,compiled,fused,graph", "--batch-sizes", "64,256,1024"),
    ),
    _train("bc100", "cifar10_bc100", "test error against 4.51 %"),
    _train("bc100-cifar100", "cifar10_bc100", "test error against 22.27 %", "data.name=cifar100"),
    _train("densenet40", "cifar10_densenet40", "test error against 5.24 %"),
    _train("densenet40-cifar100", "cifar10_densenet40", "test error against 24.42 %", "data.name=cifar100"),
)
"""In the order of what matters most."""


class Visit:
    """The steps, and how far each is.

    Args:
        out: where results go.
        runs: where runs go; ``visit.json`` there says what is done.
        data: the folder with CIFAR.
        small: whether to take only the way.
    """

    def __init__(self, out: Path, runs: Path, data: str, small: bool) -> None:
        self.out, self.runs, self.data, self.small = out, runs, data, small
        self._state = self.runs / "visit.json"
        self.failed: list[str] = []
        out.mkdir(parents=True, exist_ok=True)
        self.runs.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, dict[str, object]] = json.loads(self._state.read_text()) if self._state.exists() else {}

    def go_on(self, minutes: float, only: Sequence[str]) -> bool:
        """Take steps until the time is up; whether all are done."""
        end = time.monotonic() + 60 * minutes
        left = [step for step in STEPS if step.name not in self.done and (not only or step.name in only)]
        for step in left:
            seconds = end - time.monotonic()
            if seconds < 60 * (0 if self.small else min(step.minutes, minutes - 0.1)):
                print(f"{step.name}: begins next time, {seconds:.0f} s are too few")
                return False
            print(f"== {step.name}: {step.shows}", flush=True)
            if not self._take(step, seconds):
                return False
        return True

    def _take(self, step: Step, seconds: float) -> bool:
        """One step; False where the time was up before it was through."""
        began = time.monotonic()
        code = {"train": self._train, "seeds": self._seeds, "once": self._once}[step.kind](step, seconds)
        self._keep(step)
        if code == INTERRUPTED or (step.kind == "seeds" and code == 0 and not self._all_seeds(step)):
            return False
        if code != 0:
            self.failed.append(step.name)
            return True
        self.done[step.name] = {"exit": code, "seconds": round(time.monotonic() - began, 1)}
        for path in (self._state, self.out / "visit.json"):
            path.write_text(json.dumps(self.done, indent=1) + "\n")
        return True

    def _once(self, step: Step, seconds: float) -> int:
        command = [sys.executable, "-m", *step.arguments] if step.arguments[0] == "pytest" else self._command(step)
        if step.arguments[0] == "bench":
            command += ["--out", str(self.runs / f"{step.name}.json")]
        return self._run(command, seconds, self.runs / f"{step.name}.txt")

    def _train(self, step: Step, seconds: float) -> int:
        run = self.runs / step.name
        if (run / "checkpoints").exists():
            command = [*COMMAND, "train", "--resume", str(run)]
        else:
            shutil.rmtree(run, ignore_errors=True)  # of a start that came to nothing
            command = [*COMMAND, "train", *self._settings(step), f"name={step.name}", f"storage={self.runs}"]
        return self._run(command, seconds, self.runs / f"{step.name}.txt")

    def _seeds(self, step: Step, seconds: float) -> int:
        command = [sys.executable, "benchmarks/time_to_accuracy.py", *self._settings(step)]
        command += ["--minutes", f"{max(0.1, seconds / 60 - 0.3):.2f}", "--out", str(self._outcome(step))]
        return self._run(command, seconds, self.runs / f"{step.name}.txt")

    def _settings(self, step: Step) -> list[str]:
        """With the small ones before the options, and after those that they replace."""
        options = next((place for place, text in enumerate(step.arguments) if text.startswith("--")), None)
        settings = [*step.arguments[:options], f"data.root={self.data}", *(SMALL if self.small else ())]
        return settings + (list(step.arguments[options:]) if options is not None else [])

    def _command(self, step: Step) -> list[str]:
        if step.arguments[0] == "doctor":
            return [*COMMAND, "doctor", f"data.root={self.data}", *(() if self.small else step.arguments[1:])]
        small = ("--seconds", "0.05", "--batch-sizes", "64") if self.small else ()
        rest = Step(step.name, step.kind, step.arguments[2:], step.minutes, step.shows)
        return [*COMMAND, *step.arguments[:2], *self._settings(rest), *small]

    def _run(self, command: list[str], seconds: float, output: Path) -> int:
        print("  " + " ".join(command[1:]), flush=True)
        with open(output, "a", encoding="utf-8") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT)
            try:
                code = process.wait(max(1.0, seconds - 20))  # which it may take to save
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                code = INTERRUPTED
        print(f"  exit {code}: " + " | ".join(output.read_text().splitlines()[-2:]), flush=True)
        return code

    def _keep(self, step: Step) -> None:
        """Copy what is worth keeping."""
        for path in (self.runs / f"{step.name}.txt", self._outcome(step)):
            if path.exists():
                shutil.copy(path, self.out)
        for name in KEPT:
            if (self.runs / step.name / name).exists():
                (self.out / step.name).mkdir(exist_ok=True)
                shutil.copy(self.runs / step.name / name, self.out / step.name)

    def _outcome(self, step: Step) -> Path:
        return self.runs / f"{step.name}.json"

    def _all_seeds(self, step: Step) -> bool:
        wanted = int(step.arguments[step.arguments.index("--seeds") + 1])
        return len(json.loads(self._outcome(step).read_text())["runs"]) >= wanted


def table(out: Path) -> str:
    """What has been measured, Markdown."""
    lines = ["| what | should show | test top-1 | test top-5 | seconds of training |"]
    lines += ["| --- | --- | ---: | ---: | ---: |"]
    for step in STEPS:
        summary, outcome = out / step.name / "summary.json", out / f"{step.name}.json"
        cells = ["not measured"] * 3
        if step.kind == "train" and summary.exists():
            found = json.loads(summary.read_text())
            cells = [f"{found['test/top1']:.2%}", f"{found['test/top5']:.2%}", f"{found['train_seconds']:,.0f}"]
        elif step.kind == "seeds" and outcome.exists() and (found := json.loads(outcome.read_text()))["summary"]:
            last = found["summary"]["last"]
            cells = [_spread(last["test/top1"], 100, " %"), _spread(last["test/top5"], 100, " %")]
            cells += [_spread(last["seconds"], 1, "")]
        if step.kind != "once":
            lines.append(f"| {step.name} | {step.shows} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(value: dict[str, float | None], scale: float, unit: str) -> str:
    mean, half = value["mean"], value["half"]
    assert mean is not None
    return f"{mean * scale:.2f}{unit}" + ("" if half is None else f" +- {half * scale:.2f}")


def main() -> None:
    """Take steps, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", metavar="STEP", help=f"of {', '.join(step.name for step in STEPS)}")
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--data", default="data", help="folder with CIFAR")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "visit", help="folder for runs")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop")
    parser.add_argument("--small", action="store_true", help="take the same way on a CPU in a few minutes")
    parser.add_argument("--table", action="store_true", help="print what is measured so far")
    asked = parser.parse_args()
    unknown = set(asked.only) - {step.name for step in STEPS}
    if unknown:
        parser.error(f"there is no step {', '.join(sorted(unknown))}")
    if asked.table:
        print(table(asked.out))
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    visit = Visit(asked.out.absolute(), asked.runs.absolute(), os.path.abspath(asked.data), asked.small)
    through = visit.go_on(asked.minutes, asked.only)
    print("all done" if through and not visit.failed else "to be continued: the same command again")
    if visit.failed:
        print(f"failed: {', '.join(visit.failed)} (see their .txt); the same command tries them again")
    raise SystemExit(bool(visit.failed))


if __name__ == "__main__":
    main()
