"""The format torch-export: a ``.pt2`` archive that `torch.export.load` opens anywhere PyTorch is, without this package.

This package writes it and does not read it back: `torch.export.load` unpickles what an archive says is a pickle, and
evaluates its size expressions as Python, so it is not fit for a file from a stranger.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from densenet_dist.inference.header import HEADER_KEY, Header
from densenet_dist.inference.network import Network, to_bfloat16

MOST_IMAGES: Final = 1 << 16
"""In a batch of an exported program."""


def to_bytes(network: Network, header: Header) -> bytes:
    """A file of a trained network in float32, in the header's precision. `network` is changed."""
    if header.precision == "bf16":
        to_bfloat16(network.model)
    file = io.BytesIO()
    with quiet():
        torch.export.save(traced(network, header), file, extra_files={f"{HEADER_KEY}.json": header.to_json()})
    return file.getvalue()


def traced(network: Network, header: Header) -> torch.export.ExportedProgram:
    """The network as a program for batches of 1 to `MOST_IMAGES` images. Its weights become contiguous."""
    network = network.eval().requires_grad_(False)
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch's stubs lack the keyword
    # Two images: of one, the tracer would take the batch's size for a constant.
    example = torch.zeros(2, 3, header.image_size, header.image_size)
    batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
    with torch.no_grad(), quiet():
        return torch.export.export(network, (example,), dynamic_shapes=({0: batch},))


def load_own(path: Path) -> Callable[[Tensor], Tensor]:
    """Load the program in a file that this very process has written; never another file (see above)."""
    with quiet():
        program: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that PyTorch gives of its own workings."""
    with warnings.catch_warnings():
        for kind in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", kind)
        yield
