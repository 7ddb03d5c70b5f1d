"""Makes a lock one for machines without a GPU; the Dockerfile uses it when TORCH_INDEX is given.

    python cpu_lock.py LOCK TORCH

Takes CUDA, Triton and DALI out of the file LOCK, and moves torch and torchvision to the file TORCH, without their
hashes: wheels for CPUs are other files of the same versions. All other entries stay as they are, hashes included.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

MOVED = {"torch", "torchvision"}
# nvidia-dali-cuda130 is among them.
LEFT_OUT = re.compile(r"(nvidia|cuda)-.+|triton")


def split(lock: str) -> tuple[str, str]:
    """The lock without what CPUs cannot use, and the entries of torch and torchvision without hashes.

    Raises:
        ValueError: where the lock does not pin both.
    """
    kept, moved = [], {}
    for entry in re.split(r"^(?=\S)", lock, flags=re.MULTILINE):
        name = re.split(r"[=\s]", entry, maxsplit=1)[0]
        if name in MOVED:
            moved[name] = entry.splitlines()[0].removesuffix("\\").rstrip() + "\n"
        elif not LEFT_OUT.fullmatch(name):
            kept.append(entry)
    if missing := MOVED - set(moved):
        raise ValueError(f"{' and '.join(sorted(missing))} not pinned; is it a file that `make lock` wrote?")
    return "".join(kept), "".join(moved.values())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    lock, torch = map(Path, sys.argv[1:])
    try:
        kept, moved = split(lock.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {lock}: {error}")
    lock.write_text(kept)
    torch.write_text(moved)
