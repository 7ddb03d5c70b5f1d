"""The format torch-export: a ``.pt2`` archive that `torch.export.load` opens anywhere PyTorch is, without this package.

What PyTorch's own loader does with an archive is not fit for one from a stranger: `torch.export.load` unpickles weights
and constants that the archive says are pickles (``use_pickle``, ``weights_only=False``), always unpickles the sample
inputs, and hands size expressions of the program to SymPy's parser, which evaluates them as Python. So `read` never
calls it: it takes the header and the weights' plain bytes out of the archive, and builds the net anew. `run_program` is
for files that this very process has just written.
"""

from __future__ import annotations

import json
import math
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Final

import torch
from torch import Tensor

from densenet_dist.errors import CheckpointError
from densenet_dist.inference.header import HEADER_KEY, Header, header_of
from densenet_dist.inference.network import Network, empty_net, to_bfloat16
from densenet_dist.inference.weights import Kind, filled, kinds, require_same, without_counters
from densenet_dist.model import DenseNet

MOST_IMAGES: Final = 1 << 16
"""In a batch of an exported program."""

_HEADER_FILE: Final = f"{HEADER_KEY}.json"
_CONFIG: Final = "data/weights/model_weights_config.json"
_PREFIX: Final = "model."  # of the net's weights in a Network
_DTYPES: Final = {7: torch.float32, 13: torch.bfloat16, 5: torch.int64}  # torch._export.serde.schema.ScalarType
_MOST_JSON: Final = 64 << 20
_MOST_MEMBERS: Final = 100_000
_UNREADABLE: Final = (
    *(OSError, EOFError, zipfile.BadZipFile, zlib.error),
    *(ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError),  # JSON that is not what was written
)


def write(network: Network, header: Header, path: Path) -> None:
    """Write a trained network in float32, in the precision that the header says. `network` is changed."""
    if header.precision == "bf16" and isinstance(network.model, DenseNet):
        to_bfloat16(network.model)
    with quiet():
        torch.export.save(traced(network, header), path, extra_files={_HEADER_FILE: header.to_json()})


def traced(network: Network, header: Header) -> torch.export.ExportedProgram:
    """The network as a program for batches of 1 to `MOST_IMAGES` images. Its weights become contiguous."""
    network = network.eval().requires_grad_(False)
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch's stubs lack the keyword
    # Two images: of one, the tracer would take the batch's size for a constant.
    example = torch.zeros(2, 3, header.image_size, header.image_size)
    batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
    with torch.no_grad(), quiet():
        return torch.export.export(network, (example,), dynamic_shapes=({0: batch},))


def run_program(path: Path) -> Callable[[Tensor], Tensor]:
    """The program in a file that this process wrote itself, as PyTorch runs it; never of another file (see above)."""
    with quiet():
        program: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return program


def read(path: Path) -> tuple[Header, Network]:
    """Read header and weights of a file that anybody may have written; its program is not run.

    Raises:
        CheckpointError: it is damaged, or not what `write` makes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path)
            extra = members.get(f"extra/{_HEADER_FILE}")
            header = header_of(None if extra is None else _bytes(archive, extra, _MOST_JSON), str(path))
            model = empty_net(header)
            weights = _weights(archive, members, model, str(path))
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} is damaged, or no exported net: {error}") from error
    except (NotImplementedError, RuntimeError) as error:  # zipfile's: encrypted, or packed in a way it does not know
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return header, Network(filled(model, weights), header.mean, header.std).eval()


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The archive's files by name, without the folder that holds them all."""
    infos = archive.infolist()
    if len(infos) > _MOST_MEMBERS:
        raise ValueError(f"it has {len(infos):,} members")
    # torch.export.save packs nothing: a packed member could unpack to any size.
    if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in infos):
        raise ValueError("it has packed members")
    if sum(info.file_size for info in infos) > path.stat().st_size:
        raise ValueError("its members overlap")
    members = {str(PurePosixPath(*PurePosixPath(info.filename).parts[1:])): info for info in infos}
    if len(members) != len(infos):
        raise ValueError("it has two members of the same name")
    return members


def _bytes(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> bytes:
    if info.file_size > most:
        raise ValueError(f"{info.filename!a} has {info.file_size:,} bytes, more than {most:,}")
    return archive.read(info)


def _weights(
    archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], model: DenseNet, origin: str
) -> dict[str, Tensor]:
    said = json.loads(_bytes(archive, members[_CONFIG], _MOST_JSON))["config"]
    if any(entry["use_pickle"] for entry in said.values()):
        raise CheckpointError(f"{origin} holds pickled weights: what is in a pickle can run; they are not read")
    entries = {name.removeprefix(_PREFIX): said[name] for name in without_counters(said)}
    own = model.state_dict()
    wanted = kinds({name: own[name] for name in without_counters(own)})
    require_same({name: _kind(entry["tensor_meta"]) for name, entry in entries.items()}, wanted, origin)
    return {
        name: _tensor(archive, members[f"data/weights/{entry['path_name']}"], wanted[name], entry["tensor_meta"])
        for name, entry in entries.items()
    }


def _kind(meta: dict[str, Any]) -> Kind:
    return _DTYPES[meta["dtype"]], tuple(_whole(meta["sizes"]))


def _whole(numbers: list[dict[str, Any]]) -> list[int]:
    found = [number["as_int"] for number in numbers]
    if not all(type(number) is int for number in found):
        raise ValueError("a size is no whole number")
    return found


def _tensor(archive: zipfile.ZipFile, info: zipfile.ZipInfo, kind: Kind, meta: dict[str, Any]) -> Tensor:
    dtype, shape = kind
    size = math.prod(shape) * dtype.itemsize
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    if info.file_size != size or _whole(meta["strides"]) != strides or meta["storage_offset"] != {"as_int": 0}:
        raise ValueError(f"{info.filename!a} is not laid out as one tensor")
    return torch.frombuffer(bytearray(archive.read(info)), dtype=dtype).view(shape)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that PyTorch gives of its own workings."""
    with warnings.catch_warnings():
        for kind in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", kind)
        yield
