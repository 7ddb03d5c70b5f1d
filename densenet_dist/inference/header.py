"""What an exported file says of itself, as JSON: all that is needed to build the net and to prepare pictures for it.

A file may come from anybody, so nothing in it is believed: types, sizes and texts have limits, and the net is built
only where `Architecture` finds nothing wrong.
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
"""Under which every format keeps the header."""

Precision = Literal["fp32", "bf16"]

_MOST_BYTES: Final = 8 << 20  # 21,841 classes of ImageNet with their long names take less than 2 MiB
_MOST_LAYERS: Final = 2000  # 500 times a second are built; densenet201 has 98
Name = Annotated[str, Field(min_length=1, max_length=1000)]
Text = Annotated[str, Field(max_length=1000)]
Finite = Annotated[float, Field(allow_inf_nan=False, ge=-1e3, le=1e3)]
Share = Annotated[float, Field(gt=0, le=1)]
Deviation = Annotated[float, Field(allow_inf_nan=False, ge=1e-6, le=1e3)]
_Width = Annotated[int, Field(ge=1, le=1 << 14)]


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "strict": True})
class _Net:
    """`Architecture` with limits; field for field."""

    growth_rate: _Width
    num_layers: Annotated[tuple[Annotated[int, Field(ge=1, le=_MOST_LAYERS)], ...], Field(min_length=1, max_length=16)]
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
    """What an exported file holds besides weights.

    Attributes:
        format: of this header.
        version: of the package that wrote it.
        run: the run's name; data the data set's.
        checkpoint: which, such as ``best, step-00000120``.
        commit: of the code that exported it; None outside of a checkout.
        created: when, ISO 8601.
        class_names: by label.
        architecture: the net's, see `densenet_dist.model.architecture.Architecture`.
        mean, std: by which images in [0, 1] are normalised, red, green, blue. The exported programs do that themselves:
            they take grey levels, 0 to 255.
        crop: a picture is cut to its central square, this share of its shorter side, then resampled to the net's size
            by a triangle filter.
        precision: of the weights.
        metrics: the checkpoint's validation figures.
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
    metrics: Annotated[dict[Text, Finite], Field(max_length=100)]

    @property
    def image_size(self) -> int:
        """Side in pixels of the square images that the net takes."""
        return self.architecture.image_size

    def to_json(self) -> str:
        """As `header_of` reads it."""
        return _ADAPTER.dump_json(self).decode()


_ADAPTER: Final = TypeAdapter(Header)


def make_header(architecture: Architecture, **fields: Any) -> Header:
    """A header of a net of our own, by the names of its fields; the net is exported in the reference form.

    Raises:
        CheckpointError: a value is beyond the limits; a run's folder may come from anybody, too.
    """
    try:
        net = _Net(**asdict(architecture) | {"block": "reference"})
        header = Header(format=1, architecture=net, **fields)
    except ValidationError as error:
        raise CheckpointError(f"the run's net cannot be used: {_problem(error)}") from None
    if problem := _contradiction(header):
        raise CheckpointError(f"the run's net cannot be used: {problem}")
    return header


def header_of(text: str | bytes | None, origin: str) -> Header:
    """The header of a file that anybody may have written.

    Args:
        text: JSON; None where the file has none.
        origin: the file, for messages.

    Raises:
        CheckpointError: there is none, or it is not what `densenet-dist export` writes.
    """
    if text is None:
        raise CheckpointError(
            f"{origin} was not written by densenet-dist export: it has no {HEADER_KEY} in its metadata"
        )
    if len(text) > _MOST_BYTES:
        raise CheckpointError(f"{origin}: its metadata has {len(text):,} bytes, more than {_MOST_BYTES:,}")
    try:
        header = _ADAPTER.validate_json(text)
    except ValidationError as error:
        if any(item["loc"] == ("precision",) and item["input"] == "int8" for item in error.errors()):
            raise CheckpointError(
                f"{origin} has int8 weights, which are not supported any more\n"
                "  export the run again with --precision fp32 or bf16"
            ) from None
        raise CheckpointError(f"{origin}: its metadata is not that of an exported net: {_problem(error)}") from None
    if problem := _contradiction(header):
        raise CheckpointError(f"{origin}: its metadata is not that of an exported net: {problem}")
    return header


def architecture_of(header: Header) -> Architecture:
    """The shape of its net."""
    return Architecture(**asdict(header.architecture))


def _contradiction(header: Header) -> str | None:
    """What does not fit together in it, or would be a danger to a terminal."""
    net = header.architecture
    if len(header.class_names) != net.num_classes:
        return f"{len(header.class_names)} class names for {net.num_classes} classes"
    for text in (header.version, header.run, header.data, header.checkpoint, header.commit or "", header.created):
        if printable(text) != text:
            return f"{text!a} cannot be printed"
    for name in header.class_names:
        if printable(name) != name:
            return f"the class name {name!a} cannot be printed"
    if sum(net.num_layers) > _MOST_LAYERS:
        return f"{sum(net.num_layers)} layers, more than {_MOST_LAYERS}"
    problems = architecture_of(header).problems()
    return problems[0] if problems else None


def _problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return printable(f"{where}: {first['msg']}" if where else first["msg"])[:300]
