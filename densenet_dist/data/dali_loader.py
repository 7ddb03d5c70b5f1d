"""The DALI engine: the same pixels as those of `torch_loader`, on a GPU, or on a CPU without one.

One endless pipeline per loader reads the requests, by number, from an external source: images in memory (kept on the
GPU if there is one) or the encoded bytes of files, and the parameters drawn by `augment`. DALI itself draws no random
numbers and has no state, and it works ahead across epochs.

DALI's CPU operators process single images; those on raw CIFAR records (slice, reinterpret, transpose) take more than
half of the time there, so the images are converted to HWC once, when they are loaded (docs/log.md).

DALI is imported only when selected; `require_dali` checks that it works on this machine.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata, util
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from densenet_dist.data.engine import BatchProducer, Engine, Request
from densenet_dist.data.image_files import ImageFiles, Split
from densenet_dist.data.torch_ops import GRAY
from densenet_dist.data.trivial_augment import Tone
from densenet_dist.errors import EnvironmentProblem

PACKAGE = "nvidia-dali-cuda130"
_ALTERNATIVE = "augment with torch instead: data.loader=torch"
_READERS = 8  # threads that read files: they mostly wait for a disk or a network


class DaliEngine(Engine):
    """Engine of DALI pipelines, one for each loader.

    Raises:
        EnvironmentProblem: DALI is not installed, or cannot run on the device.
    """

    def __init__(self, split: Split, *, device: torch.device | str = "cpu", **options: Any) -> None:
        require_dali(torch.device(device), decoding=isinstance(split.images, ImageFiles))
        super().__init__(split, device=device, **options)
        self.prefetch = max(1, self.prefetch)
        self._readers = ThreadPoolExecutor(_READERS, "densenet-dist-read")

    def batches(self, request: Callable[[int], Request], largest: int) -> BatchProducer:
        """See `Engine.batches`; each loader has a pipeline of its own, built on first use."""
        return _Pipeline(self, request, largest).batches

    def sources(self, request: Request) -> list[Any]:
        """Return the images of a request; of image files, their bytes, and start and shape of their windows."""
        if self.resident is not None:
            images = self.resident.index_select(0, request.tensor("indices", self.device))
            return [images if images.is_cuda else images.numpy()]
        files = self.files
        assert files is not None
        # Read here and not by DALI, which a broken file can crash.
        encoded = list(self._readers.map(files.encoded, request.array("indices").tolist()))
        left, top, width, height = request.array("window").astype(np.int32).T
        return [encoded, np.stack([top, left], axis=1), np.stack([height, width], axis=1)]

    @staticmethod
    def parameters(request: Request) -> dict[str, npt.NDArray[Any]]:
        """Return the parameters of a request's images, by the names that `_build` uses, in host memory."""
        drawn = request.epoch.parameters
        arrays: dict[str, npt.NDArray[Any]] = {}
        if drawn.tone is not None:
            arrays |= {"tone": request.array("tone").astype(np.int32), "strength": request.array("strength")}
        if drawn.affine is not None:
            arrays["matrix"] = request.array("matrix")
        if drawn.hole is not None:
            left, top, right, bottom = request.array("hole").astype(np.float32).T
            arrays["hole_start"] = np.stack([top, left], axis=1)
            arrays["hole_shape"] = np.stack([bottom - top, right - left], axis=1)
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}  # a rank's share is strided


class _Pipeline:
    """Produces the batches of one loader by one DALI pipeline, which works ahead without end."""

    def __init__(self, engine: DaliEngine, request: Callable[[int], Request], largest: int) -> None:
        self._engine, self._request, self._largest = engine, request, largest
        self._pipeline: Any = None
        self._next = 0

    def batches(self, first: int, last: int) -> Iterator[Tensor]:
        """See `engine.BatchProducer`. The pipeline is rebuilt unless it is at request `first`."""
        for number in range(first, last):
            if self._pipeline is None or self._next != number:
                self._pipeline = _build(self._engine, self._request, number, self._largest)
            try:
                images = self._run()
            except RuntimeError as error:
                self._pipeline = None
                reason = " ".join(str(error).rpartition("encountered:")[2].split())  # without DALI's traceback
                raise _problem(f"failed on {self._engine.device}: {reason[:300]}") from error
            self._next = number + 1
            yield images

    def _run(self) -> Tensor:
        cuda = self._engine.device.type == "cuda"
        (output,) = self._pipeline.run(torch.cuda.current_stream(self._engine.device) if cuda else None)
        # HWC in memory is channels_last: a view, and DALI does not reuse the memory while it is referenced.
        images: Tensor = torch.utils.dlpack.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)
        return images


def _build(engine: DaliEngine, request: Callable[[int], Request], start: int, largest: int) -> Any:
    """Build a pipeline whose first batch is that of request `start`, the next that of `start + 1`, and so on."""
    from nvidia.dali import fn, pipeline_def, types

    gpu = engine.device.type == "cuda"
    padding, names = request(start).epoch.parameters.padding, list(engine.parameters(request(start)))

    # DALI passes the number of the batch only to a source with exactly one positional parameter.
    def parameters(number: int) -> list[npt.NDArray[Any]]:
        return list(engine.parameters(request(start + number)).values())

    def images(number: int) -> Any:
        return engine.sources(request(start + number))

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=largest,
        num_threads=engine.threads,
        device_id=(engine.device.index or 0) if gpu else None,
        prefetch_queue_depth=engine.prefetch,
        exec_dynamic=True,
        enable_conditionals="tone" in names,
    )
    def pipeline() -> Any:
        columns = fn.external_source(source=parameters, num_outputs=len(names), batch=True) if names else []
        inputs = {name: columns[index] for index, name in enumerate(names)}
        pixels = _read(engine, images)
        if "tone" in inputs:
            pixels = _toned(pixels, inputs["tone"], inputs["strength"], engine.image_size, gpu)
        if "matrix" in inputs:
            # Without a fill value DALI repeats the border. Integer output would be rounded, by up to half a level.
            outside: Any = {"fill_value": 0} if padding == "zeros" else {}
            pixels = fn.warp_affine(pixels, matrix=inputs["matrix"], dtype=types.FLOAT, **outside)
        mean, std = ([255.0 * value for value in values] for values in (engine.mean, engine.std))
        pixels = fn.crop_mirror_normalize(pixels, dtype=types.FLOAT, output_layout="HWC", mean=mean, std=std)
        if "hole_start" in inputs:
            hole: Any = {"anchor": inputs["hole_start"], "shape": inputs["hole_shape"]}
            pixels = fn.erase(pixels, **hole, axes=[0, 1], fill_value=0.0)
        return pixels

    return pipeline()


def _read(engine: DaliEngine, source: Callable[[int], Any]) -> Any:
    """Read images (H, W, 3): uint8 from memory; float32 gray levels, not rounded, from files."""
    from nvidia.dali import fn, types

    gpu = engine.device.type == "cuda"
    if engine.files is None:
        device = "gpu" if gpu else "cpu"
        (images,) = fn.external_source(source=source, num_outputs=1, batch=True, layout=["HWC"], device=device)
        return images
    encoded, start, shape = fn.external_source(source=source, num_outputs=3, batch=True)
    device = "mixed" if gpu else "cpu"
    images = fn.decoders.image(encoded, device=device, output_type=types.RGB, jpeg_fancy_upsampling=True)
    windows = fn.slice(images, start=start, shape=shape, axes=[0, 1])
    size = [engine.image_size, engine.image_size]
    return fn.resize(windows, size=size, dtype=types.FLOAT, interp_type=types.INTERP_LINEAR, antialias=True)


def _toned(images: Any, tone: Any, strength: Any, size: int, gpu: bool) -> Any:
    """Apply each image's `Tone`; the result is float gray levels in [0, 255]."""
    from nvidia.dali import fn, math, types

    levels = fn.cast(images, dtype=types.FLOAT)
    whole = fn.cast(images, dtype=types.UINT8)
    strength = strength.gpu() if gpu else strength
    if tone == Tone.BRIGHTNESS.value:
        levels = levels * strength
    elif tone == Tone.COLOR.value:
        gray = fn.coord_transform(levels, M=list(GRAY) * 3, dtype=types.FLOAT)
        levels = gray + (levels - gray) * strength
    elif tone == Tone.CONTRAST.value:
        mean = fn.reductions.mean(fn.coord_transform(levels, M=list(GRAY), dtype=types.FLOAT))
        levels = mean + (levels - mean) * strength
    elif tone == Tone.SHARPNESS.value:
        kernel, inner = np.full((3, 3), 1 / 13, np.float32), np.zeros((size, size, 1), np.float32)
        kernel[1, 1], inner[1:-1, 1:-1] = 5 / 13, 1.0  # border pixels stay
        kernel, inner = (types.Constant(array, device="gpu" if gpu else "cpu") for array in (kernel, inner))
        smooth = fn.filter(levels, kernel, border="reflect_101")
        smooth = levels + (smooth - levels) * inner
        levels = smooth + (levels - smooth) * strength
    elif tone == Tone.POSTERIZE.value:
        levels = fn.cast(whole & fn.cast(strength, dtype=types.UINT8), dtype=types.FLOAT)
    elif tone == Tone.SOLARIZE.value:
        inverted = fn.cast(levels >= strength, dtype=types.FLOAT)
        levels = levels + inverted * (255.0 - 2.0 * levels)
    elif tone == Tone.AUTOCONTRAST.value:
        low = fn.reductions.min(levels, axes=[0, 1], keep_dims=True)
        span = fn.reductions.max(levels, axes=[0, 1], keep_dims=True) - low
        flat = fn.cast(span == 0.0, dtype=types.FLOAT)  # such a channel stays as it is
        levels = (levels - low * (1.0 - flat)) * ((255.0 - 254.0 * flat) / (span + flat))
    elif tone == Tone.EQUALIZE.value:
        levels = fn.cast(fn.equalize(whole), dtype=types.FLOAT)
    return math.clamp(levels, 0.0, 255.0)


def dali_installed() -> bool:
    """Return whether the package is installed; it may not work."""
    try:
        return util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # there is no package "nvidia" either
        return False


def require_dali(device: torch.device, *, decoding: bool) -> None:
    """Check that DALI works on `device`, also for decoding files; else raise EnvironmentProblem with a remedy."""
    if not dali_installed():
        raise EnvironmentProblem(
            f"data.loader=dali, but DALI is not installed\n  install it: pip install {PACKAGE}\n  or {_ALTERNATIVE}"
        )
    try:
        backend = importlib.import_module("nvidia.dali.backend")
        importlib.import_module("nvidia.dali.fn")
        if device.type == "cuda" and backend.GetCUDADeviceCount() == 0:
            raise RuntimeError("no GPU")
    except (ImportError, OSError, RuntimeError) as error:
        raise _problem(f"cannot be used on {device}: {error}") from error
    if decoding and backend.GetNvimgcodecVersion() == -1:
        raise _problem("cannot decode images: nvidia-nvimgcodec-cu13 is missing")


def _problem(what: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"DALI {dali_version()} {what}\n"
        f"  update the NVIDIA driver, or install DALI again: pip install --force-reinstall {PACKAGE}\n"
        f"  or {_ALTERNATIVE}"
    )


def dali_version() -> str | None:
    """Return the installed version, or None."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(PACKAGE)
    return None
