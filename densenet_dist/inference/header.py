"""The metadata of an exported file as JSON: everything needed to build the model and to preprocess images.

Files are untrusted: types, sizes and texts have limits, and the model is built only if `Architecture` finds no problem.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final, Literal

from pydantic import Field, JsonValue, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from densenet_dist.custom import NAME
from densenet_dist.data.image_folder import printable
from densenet_dist.errors import CheckpointError
from densenet_dist.model.architecture import Architecture

HEADER_KEY: Final = "densenet_dist"
"""The key of the header in the metadata of every format."""

_MAX_BYTES: Final = 8 << 20  # the 21,841 classes of ImageNet-21k take less than 2 MiB
_MAX_BLOCKS: Final = 16
_MAX_LAYERS: Final = 2000  # densenet201 has 98; 500 layers take a second to build
_LARGEST: Final = {"growth_rate": 1 << 14, "stem_channels": 1 << 14, "bn_size": 64, "norm_eps": 1, "image_size": 4096}
Name = Annotated[str, Field(min_length=1, max_length=1000)]
Text = Annotated[str, Field(max_length=1000)]
Finite = Annotated[float, Field(allow_inf_nan=False, ge=-1e3, le=1e3)]
Deviation = Annotated[float, Field(allow_inf_nan=False, ge=1e-6, le=1e3)]


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "strict": True})
class CustomModel:
    """A custom model: its name, its options, and the side of its square images in pixels."""

    name: Annotated[str, Field(max_length=1000, pattern=rf"^{NAME.pattern}$")]
    options: dict[Text, JsonValue]
    image_size: Annotated[int, Field(ge=1, le=_LARGEST["image_size"])]


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
        architecture: of a DenseNet; None for a custom model.
        mean, std: normalization of images in [0, 1], by channel (RGB). The exported programs include it: they take
            pixel values from 0 to 255.
        crop: side of the central square to use as a share of the image's shorter side. The square is resampled to the
            model's size by a triangle filter.
        precision: of the weights.
        metrics: validation metrics of the checkpoint.
        custom: the custom model, if it is one, which is imported only if the user trusts it.
    """

    format: Literal[1]
    version: Text
    run: Text
    data: Text
    checkpoint: Text
    commit: Text | None
    created: Text
    class_names: Annotated[tuple[Name, ...], Field(min_length=1, max_length=1 << 20)]
    architecture: Architecture | None
    mean: tuple[Finite, Finite, Finite]
    std: tuple[Deviation, Deviation, Deviation]
    crop: Annotated[float, Field(gt=0, le=1)]
    precision: Literal["fp32"]
    metrics: Annotated[dict[Text, Annotated[float, Field(allow_inf_nan=False)]], Field(max_length=100)]
    custom: CustomModel | None = None

    def __post_init__(self) -> None:
        if problem := next(self._problems(), None):
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        """Find values that contradict each other or are too large, and characters that would affect a terminal."""
        net = self.architecture
        if (net is None) == (self.custom is None):
            yield "it must have an architecture or a custom model"
            return
        if net is not None and len(self.class_names) != net.num_classes:
            yield f"{len(self.class_names)} class names for {net.num_classes} classes"
        for text in (self.version, self.run, self.data, self.checkpoint, self.commit or "", self.created):
            if printable(text) != text:
                yield f"{text!a} cannot be printed"
        for name in self.class_names:
            if printable(name) != name:
                yield f"the class name {name!a} cannot be printed"
        if net is None:
            return
        for key, largest in _LARGEST.items():
            if (getattr(net, key) or 0) > largest:
                yield f"architecture.{key}: more than {largest:,}"
        if net.in_channels != 3:
            yield "architecture.in_channels: must be 3"
        if len(net.num_layers) > _MAX_BLOCKS:
            yield f"{len(net.num_layers)} blocks, more than {_MAX_BLOCKS}"
        if sum(net.num_layers) > _MAX_LAYERS:
            yield f"{sum(net.num_layers)} layers, more than {_MAX_LAYERS}"
        yield from net.problems()

    @property
    def image_size(self) -> int:
        """Side of the model's square input images in pixels."""
        model = self.architecture or self.custom
        assert model is not None  # see `_problems`
        return model.image_size

    def to_json(self) -> str:
        """Serialize for `header_of`."""
        return _ADAPTER.dump_json(self).decode()


_ADAPTER: Final = TypeAdapter(Header)


def header_of(text: str | bytes | None, origin: str) -> Header:
    """Read the header of an untrusted file, whose name for messages is `origin`.

    Args:
        text: JSON; None if the file has none.

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
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        problem = first_problem(error)
        raise CheckpointError(f"{origin}: its metadata is not that of an exported model: {problem}") from None


def first_problem(error: ValidationError) -> str:
    """Describe the first problem of a header in one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where, text = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    return printable(f"{where}: {text}" if where else text)[:300]
