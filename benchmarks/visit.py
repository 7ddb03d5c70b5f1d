"""The first visit to a GPU: everything that about eight minutes can show, in one command.

    python benchmarks/visit.py visit.tar.gz

needs a checkout of this repository, torch, triton, numpy, Pillow, PyYAML and pydantic, and pytest for the part "tests".
Each part runs in a process of its own, which is killed at the part's time limit; a part that fails does not end the
visit. After each part the archive is written anew: summary.md, the output of each part, and the raw figures as JSON.
If the archive exists, parts that are done in it are not repeated. SIGINT and SIGTERM end the visit with what there is.
``--small`` runs the same code with small sizes on a CPU, in about a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
UNFINISHED = 75
"""Exit code of a part that ran out of time and continues in the next visit."""


class Part(NamedTuple):
    """A function of visit_parts.py.

    Attributes:
        name: of the function and its files.
        shows: what it shows.
        seconds: its time limit; longer if the parts before it left time, or those after it are done.
    """

    name: str
    shows: str
    seconds: float


PARTS = (
    Part("smoke", "versions, the device, one training step of the fused form against the reference form", 60),
    Part("ceilings", "bandwidth of a copy, speed of a matrix product, time per kernel of a CUDA graph", 30),
    Part("tests", "the tests marked gpu of kernels, training loop and loader, in parallel", 120),
    Part("profile", "the kernels of one captured training step of the notebook's network", 60),
    Part("model", "images/s of the training step: padded, fused, fused in a CUDA graph", 110),
    Part("convolutions", "cuDNN's convolutions at the widths of the notebook's network", 75),
    Part("hopper", "the experimental convolution: correctness, then speed", 40),
)


class Visit:
    """The parts, and the status of each.

    Args:
        archive: where everything is kept, and what an earlier visit kept.
        folder: an empty folder for the contents of the archive.
        small: whether to use small sizes and the CPU.
    """

    def __init__(self, archive: Path, folder: Path, small: bool) -> None:
        self.archive, self.folder, self.small = archive, folder, small
        archive.parent.mkdir(parents=True, exist_ok=True)
        if archive.exists():
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
        state = folder / "state.json"
        self.state: dict[str, dict[str, Any]] = json.loads(state.read_text()) if state.exists() else {}

    def run(self, minutes: float) -> None:
        """Run the parts that are not done, until the time is up."""
        end = time.monotonic() + 60 * minutes
        todo = [part for part in PARTS if self.state.get(part.name, {}).get("status") != "done"]
        for index, part in enumerate(todo):
            left, started = end - time.monotonic(), time.monotonic()
            status = "interrupted"
            try:
                if left < part.seconds:
                    status = f"not begun: {max(0, left):.0f} s were left, it may take {part.seconds:.0f}"
                else:
                    later = sum(other.seconds for other in todo[index + 1 :])
                    print(f"{part.name}: {part.shows}", flush=True)
                    status = self._run(part, max(part.seconds, left - later))
            finally:
                self.state[part.name] = {"status": status, "seconds": round(time.monotonic() - started, 1)}
                self.save()

    def _run(self, part: Part, seconds: float) -> str:
        out, script = self.folder / f"{part.name}.json", Path(__file__).with_name("visit_parts.py")
        command = [sys.executable, str(script), part.name, str(out), str(seconds), *(["--small"] if self.small else [])]
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
        with open(self.folder / f"{part.name}.txt", "w", encoding="utf-8") as sink:
            child = subprocess.Popen(
                command, stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
            try:
                code = child.wait(seconds)
            except subprocess.TimeoutExpired:
                return f"stopped at its limit of {seconds:.0f} s"
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # with the processes that it has started
                with suppress(subprocess.TimeoutExpired):  # a driver may keep it
                    child.wait(5)
        return {0: "done", UNFINISHED: "continues in the next visit"}.get(code, f"failed (exit {code})")

    def save(self) -> None:
        """Write the archive, at once complete."""
        (self.folder / "state.json").write_text(json.dumps(self.state, indent=1))
        (self.folder / "summary.md").write_text(self.summary(20_000))
        new = self.archive.with_name(f"{self.archive.name}.new")
        with tarfile.open(new, "w:gz") as tar:
            for path in sorted(self.folder.iterdir()):
                tar.add(path, path.name)
        os.replace(new, self.archive)

    def summary(self, most: int) -> str:
        """Markdown: a table of the parts, then the last `most` characters of the output of each."""
        lines = ["# Visit", "", "| part | status | s | shows |", "| --- | --- | ---: | --- |"]
        begun = [part for part in PARTS if part.name in self.state]
        lines += ["| {0.name} | {1[status]} | {1[seconds]} | {0.shows} |".format(p, self.state[p.name]) for p in begun]
        for part in begun:
            log = self.folder / f"{part.name}.txt"
            if log.exists():
                lines += ["", f"## {part.name}", "", "```", log.read_text(errors="replace")[-most:].rstrip(), "```"]
        return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", nargs="?", type=Path, default=Path("visit.tar.gz"))
    parser.add_argument("--minutes", type=float, default=8.5, help="the time limit of the visit")
    parser.add_argument("--small", action="store_true", help="small sizes on a CPU, to try it out")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = 0
    with TemporaryDirectory() as folder:
        visit = Visit(args.archive.absolute(), Path(folder), args.small)
        try:
            visit.run(args.minutes)
        except KeyboardInterrupt:
            code = 130
        print(visit.summary(1_500))
        print(f"{visit.archive}; the same command with this archive runs what is not done")
    done = sum(state["status"] == "done" for state in visit.state.values())
    raise SystemExit(code or done < len(PARTS))


if __name__ == "__main__":
    main()
