"""The metadata of an exported file as JSON: everything needed to build the model and to preprocess images.

Files are untrusted: types, sizes and texts have limits, and the model is built only if `Architecture` finds no problem.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from densenet_dist.data.image_folder import printable
from densenet_dist.errors import CheckpointError
from densenet_dist.model.architecture import Architecture, CompressionOf, Head, Init, Stem

HEADER_KEY: Final = "densenet_dist"
"""The key of the header in the metadata of every format."""

Precision = Literal["fp32", "bf16"]

_MAX_BYTES: Final = 8 << 20  # the 21,841 classes of ImageNet-21k take less than 2 MiB
_MAX_LAYERS: Final = 2000  # densenet201 has 98; 500 layers take a second to build
Name = Annotated[str, Field(min_length=1, max_length=1000)]
Text = Annotated[str, Field(max_length=1000)]
Finite = Annotated[float, Field(allow_inf_nan=False, ge=-1e3, le=1e3)]
Share = Annotated[float, Field(gt=0, le=1)]
Deviation = Annotated[float, Field(allow_inf_nan=False, ge=1e-6, le=1e3)]
_Width = Annotated[int, Field(ge=1, le=1 << 14)]


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "strict": True})
class _Net:
    """The fields of `Architecture` with limits."""

    growth_rate: _Width
    num_layers: Annotated[tuple[Annotated[int, Field(ge=1, le=_MAX_LAYERS)], ...], Field(min_length=1, max_length=16)]
    num_classes: Annotated[int, Field(ge=1, le=1 << 20)]
    stem: Stem
    stem_channels: _Width
    bn_size: Annotated[int, Field(ge=1, le=64)] | None
    compression: Share
    compression_of: CompressionOf
    drop_rate: Annotated[float, Field(ge=0, lt=1)]
    norm_momentum: Annotated[float, Field(ge=0, le=1)]
    norm_eps: Annotated[float, Field(gt=0, le=1)]
    head: Head
    init: Init
    image_size: Annotated[int, Field(ge=1, le=4096)]
    in_channels: Literal[3]
    block: Literal["reference", "fused", "auto"]


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "strict": True})
class Header:
    """The metadata of an exported model.

    Attributes:
        format: version of this header.
        version: version of the package that wrote it.
        run: name of the run.
        data: name of the data set.
        checkpoint: such as ``best, step 120``.
        commit: of the exporting code; None outside of a checkout.
        created: time in ISO 8601.
        class_names: by label.
        architecture: see `densenet_dist.model.architecture.Architecture`.
        mean, std: normalisation of images in [0, 1], by channel (RGB). The exported programs include it: they take
            pixel values from 0 to 255.
        crop: side of the central square to use as a share of the image's shorter side. The square is resampled to the
            model's size by a triangle filter.
        precision: of the weights.
        metrics: validation metrics of the checkpoint.
    """

    format: Literal[1]
    version: Text
    run: Text
    data: Text
    checkpoint: Text
    commit: Text | None
    created: Text
    class_names: Annotated[tuple[Name, ...], Field(min_length=1, max_length=1 << 20)]
    architecture: _Net
    mean: tuple[Finite, Finite, Finite]
    std: tuple[Deviation, Deviation, Deviation]
    crop: Share
    precision: Precision
    metrics: Annotated[dict[Text, Annotated[float, Field(allow_inf_nan=False)]], Field(max_length=100)]

    @property
    def image_size(self) -> int:
        """Side of the model's square input images in pixels."""
        return self.architecture.image_size

    def to_json(self) -> str:
        """Serialize for `header_of`."""
        return _ADAPTER.dump_json(self).decode()


_ADAPTER: Final = TypeAdapter(Header)


def make_header(architecture: Architecture, **fields: Any) -> Header:
    """Make the header of a run's model, with the reference form of its blocks.

    Raises:
        CheckpointError: a value exceeds its limits; the folder of a run is untrusted too.
    """
    try:
        net = _Net(**asdict(architecture) | {"block": "reference"})
        header = Header(format=1, architecture=net, **fields)
    except ValidationError as error:
        raise CheckpointError(f"the model of the run cannot be used: {_problem(error)}") from None
    if problem := _contradiction(header):
        raise CheckpointError(f"the model of the run cannot be used: {problem}")
    return header


def header_of(text: str | bytes | None, origin: str) -> Header:
    """Read the header of an untrusted file.

    Args:
        text: JSON; None if the file has none.
        origin: the file, for messages.

    Raises:
        CheckpointError: it is missing, or not what `densenet-dist export` writes.
    """
    if text is None:
        raise CheckpointError(
            f"{origin} was not written by densenet-dist export: it has no {HEADER_KEY} in its metadata"
        )
    if len(text) > _MAX_BYTES:
        raise CheckpointError(f"{origin}: its metadata has {len(text):,} bytes, more than {_MAX_BYTES:,}")
    try:
        header = _ADAPTER.validate_json(text)
    except ValidationError as error:
        raise CheckpointError(f"{origin}: its metadata is not that of an exported model: {_problem(error)}") from None
    if problem := _contradiction(header):
        raise CheckpointError(f"{origin}: its metadata is not that of an exported model: {problem}")
    return header


def architecture_of(header: Header) -> Architecture:
    """Return the architecture of the header's model."""
    return Architecture(**asdict(header.architecture))


def _contradiction(header: Header) -> str | None:
    """Find values that contradict each other, or control characters that would affect a terminal."""
    net = header.architecture
    if len(header.class_names) != net.num_classes:
        return f"{len(header.class_names)} class names for {net.num_classes} classes"
    for text in (header.version, header.run, header.data, header.checkpoint, header.commit or "", header.created):
        if printable(text) != text:
            return f"{text!a} cannot be printed"
    for name in header.class_names:
        if printable(name) != name:
            return f"the class name {name!a} cannot be printed"
    if sum(net.num_layers) > _MAX_LAYERS:
        return f"{sum(net.num_layers)} layers, more than {_MAX_LAYERS}"
    problems = architecture_of(header).problems()
    return problems[0] if problems else None


def _problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return printable(f"{where}: {first['msg']}" if where else first["msg"])[:300]
