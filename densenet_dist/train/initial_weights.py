"""Weights that training starts from: those of a run, an exported file or a PyTorch state dict, or torchvision's.

The process that starts a run reads them, checks them against the model and writes them to the run folder, where rank 0
finds them. So problems are found before training starts, no other process needs the file, and a run that is restarted
before its first checkpoint does not depend on it.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from http.client import HTTPException
from pathlib import Path, PurePath
from typing import Any, Final

import torch
from torch import Tensor, nn

from densenet_dist.config import load_run_config
from densenet_dist.custom import is_custom
from densenet_dist.errors import CheckpointError, ConfigError, EnvironmentProblem, StorageError
from densenet_dist.model.densenet import standard_name
from densenet_dist.object_store import fetch_file, is_uri
from densenet_dist.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, WEIGHTS_FILE, RunFolder, open_run
from densenet_dist.schema import Config
from densenet_dist.train.context import RunContext
from densenet_dist.train.evaluation import load_checkpoint
from densenet_dist.train.network import build_model
from densenet_dist.train.ranks import sync_from_rank0
from densenet_dist.train.snapshot import UNREADABLE, TensorSpec, require_same_tensors, tensor_specs

_PICKLES: Final = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_UNREADABLE: Final = (".pt2", ".onnx")
_STATE_DICT_KEYS: Final = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema")
"""Keys under which training scripts save a model's state dict (PyTorch's examples, torchvision, Lightning, timm)."""


def write_initial_weights(run: RunFolder, config: Config) -> None:
    """Write the weights of ``model.weights`` or ``model.pretrained`` to the run folder.

    Raises:
        StorageError: there is no such run, or the file or run cannot be read.
        CheckpointError: the file is damaged, or its tensors do not fit the model; the message lists them.
        ConfigError: there is no such file, or it has another format.
        EnvironmentProblem: torchvision's weights cannot be downloaded.
    """
    settings = config.model
    wanted, classifier = _specs_of(config)
    if settings.weights is None:
        origin, weights = f"torchvision's {settings.variant}", _torchvision_weights(settings.variant)
    else:
        origin = settings.weights
        weights = read_weights(origin, rename=not is_custom(settings.variant), names={*wanted, *classifier})
    # The workers compare the classifier: they know the number of classes.
    found = tensor_specs(_features(weights, classifier))
    require_same_tensors(found, wanted, f"the weights of {origin} do not fit the model")
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise CheckpointError(f"the weights of {origin} contain NaN or infinity")
    from safetensors.torch import save  # the training loop must work without this package

    run.write(WEIGHTS_FILE, save(weights))


def _specs_of(config: Config) -> tuple[dict[str, TensorSpec], set[str]]:
    """Return the tensors of a model except those of its classifier, and the names of the classifier's tensors.

    The classifier's tensors are those that depend on the number of classes.
    """
    if is_custom(config.model.variant):  # such a model may be one that cannot be built on the meta device
        size = config.data.resolved_image_size
        models = [build_model(config.model, count, size, 0, config.options.model) for count in (1, 2)]
    else:
        with torch.device("meta"):
            models = [build_model(config.model, count, config.data.resolved_image_size) for count in (1, 2)]
    one, two = (tensor_specs({k: t for k, t in model.state_dict().items() if _is_weight(k)}) for model in models)
    classifier = {name for name in one if one[name] != two.get(name)}
    return {name: spec for name, spec in one.items() if name not in classifier}, classifier


def _features(weights: Mapping[str, Tensor], classifier: set[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if _is_weight(name) and name not in classifier}


def _is_weight(name: str) -> bool:
    return not name.endswith(".num_batches_tracked")  # which no forward pass needs, and old files lack


def load_initial_weights(model: nn.Module, config: Config, context: RunContext) -> None:
    """If the run has no checkpoint yet, load what `write_initial_weights` wrote. A collective call.

    Rank 0 reads them; DDP copies the parameters to the other ranks. If the classifier does not fit, it keeps its random
    weights, with a note.

    Raises:
        StorageError: the file is missing or cannot be read.
        CheckpointError: the file is damaged.
    """
    if context.rank == 0 and not context.run.exists(f"{CHECKPOINTS_FOLDER}/manifest.json"):
        _load(model, config, context)
    sync_from_rank0(list(model.buffers()))  # frozen batch norms need the running statistics on every rank


def _load(model: nn.Module, config: Config, context: RunContext) -> None:
    if not context.run.exists(WEIGHTS_FILE):
        if context.run.names(CHECKPOINTS_FOLDER):  # of a finished run; the list of them is rebuilt later
            return
        raise StorageError(f"{context.run.uri}/{WEIGHTS_FILE} is missing\n  start a new run: name=NEW")
    weights = _read_file(context.run.fetch(WEIGHTS_FILE))
    own, (_, classifier) = model.state_dict(), _specs_of(config)
    there, here = (tensor_specs({name: each[name] for name in classifier if name in each}) for each in (weights, own))
    if there != here:
        weights = _features(weights, classifier)
        context.note(f"the classifier of {model.num_classes} classes starts from random weights")
    model.load_state_dict({**own, **weights})


def read_weights(location: str, *, rename: bool = True, names: AbstractSet[str] = frozenset()) -> dict[str, Tensor]:
    """Read the weights of a run's best checkpoint or of a file, as float32 under this package's names if `rename`.

    The prefix ``model.`` of all names, which Lightning adds, is removed unless `names` of the model have it.

    Files are safetensors, or PyTorch state dicts, which are read with ``weights_only=True`` and so cannot run code.

    Args:
        location: path or URI of a file or of a run's folder, or a run's name under ``runs/``.

    Raises:
        StorageError, CheckpointError, ConfigError: see `write_initial_weights`.
    """
    suffix = PurePath(location.partition("?")[0]).suffix.lower()
    if suffix in _UNREADABLE:
        raise ConfigError(
            f"model.weights: {location} is a compiled program; name the run itself, or export it as safetensors"
        )
    if suffix == ".safetensors" or suffix in _PICKLES:
        return _standard(
            _read_file(fetch_file(location) if is_uri(location) else Path(location)), location, rename, names
        )
    run = open_run(location)
    snapshot = load_checkpoint(run, "best", load_run_config(run.fetch(CONFIG_FILE)))
    return _standard(snapshot.average or snapshot.model, location, rename, names)


def _read_file(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, IsADirectoryError) as error:
        raise StorageError(f"model.weights: {path} cannot be read: {error.strerror}") from error
    except FileNotFoundError:
        raise ConfigError(f"model.weights: there is no file {path}") from None
    except (*UNREADABLE, SafetensorError, IndexError, AssertionError, struct.error) as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise CheckpointError(f"{path} is damaged, or contains more than tensors: {reason}") from error
    for key in _STATE_DICT_KEYS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} contains a {type(loaded).__name__}, not a state dict")
    return loaded


def _standard(
    weights: Mapping[str, Any], origin: str, rename: bool = True, names: AbstractSet[str] = frozenset()
) -> dict[str, Tensor]:
    tensors = {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{origin} contains no tensors by name")
    if all(name.startswith("model.") for name in tensors) and not names & tensors.keys():  # Lightning's
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    name_of = standard_name if rename else str
    return {
        name_of(name): tensor.float().contiguous() if tensor.is_floating_point() else tensor.contiguous()
        for name, tensor in tensors.items()
        if _is_weight(name)
    }


def _torchvision_weights(variant: str) -> dict[str, Tensor]:
    """Load torchvision's weights of ImageNet-1k, downloaded once to torch's hub folder, and compare their checksum."""
    from torchvision.models import get_model_weights

    url = next(iter(get_model_weights(variant))).url
    path = Path(torch.hub.get_dir(), "checkpoints", PurePath(url).name)
    digest = re.search(r"-([0-9a-f]{8,})\.pth$", url)
    assert digest is not None
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), digest[1])
        except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: the checksum differs
            raise EnvironmentProblem(
                f"model.pretrained: {url} cannot be downloaded: {error}\n"
                f"  download it elsewhere and put it into {path.parent} (or $TORCH_HOME/hub/checkpoints)"
            ) from error
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest[1]):
        raise CheckpointError(f"{path} is damaged: its checksum differs from that in its name; delete it")
    return _standard(_read_file(path), str(path))
