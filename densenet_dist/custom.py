"""Custom parts: functions of the user's modules in the place of the package's model, data set, loss and so on.

A configuration names them ``package.module:function``; their keyword-only arguments are settings, under ``options``.
Importing a module runs its code, so only names that the user gave in this process are imported (`allow`): never one
that comes only from a run folder, a checkpoint, an export or a sweep folder, which may be another person's.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any, Final, NamedTuple, TypeAlias, cast

from densenet_dist.errors import ConfigError, DenseNetDistError, TrainingError, is_out_of_memory

_WORD: Final = "[A-Za-z_][A-Za-z0-9_]*"  # no \w, which is not the same in every engine of regular expressions
NAME: Final = re.compile(rf"{_WORD}(\.{_WORD})*:{_WORD}")
"""The form of a name, ``package.module:function``, in ASCII."""
Function: TypeAlias = Callable[..., Any]


class Part(NamedTuple):
    """A part of a run that can be a custom one: the setting that names it, and the arguments that it is called with."""

    key: str
    arguments: tuple[str, ...]


PARTS: Final = {
    "model": Part("model.variant", ("num_classes", "image_size")),
    "dataset": Part("data.name", ("root", "seed")),
    "augmentation": Part("data.augment", ("draws",)),
    "loss": Part("train.loss", ("logits", "targets")),
    "optimizer": Part("train.optimizer.name", ("parameter_groups", "lr")),
    "schedule": Part("train.schedule.name", ("state",)),
    "callbacks": Part("callbacks", ()),
}
"""By the name of their section in ``options``, which is also that of `fit`'s argument."""

_allowed: dict[str, Function | None] = {}
"""The names that this process may use, with the function if it was given as an object."""


class Callback:
    """Base class of callbacks: a run calls each of them on every rank, in the order of the configuration.

    `trainer` is the rank's `densenet_dist.train.trainer.Trainer`: its ``model``, ``optimizer``, ``position``
    (``epoch``, ``step``, ``global_step``), ``config``, ``context`` (``rank``, ``world_size``, ``run``, ``note(text)``).
    """

    def on_start(self, trainer: Any) -> None:
        """Handle the start of a process, after a checkpoint was loaded."""

    def on_step(self, trainer: Any) -> None:
        """Handle the end of a step."""

    def on_epoch(self, trainer: Any, metrics: dict[str, Any]) -> None:
        """Handle the end of an epoch, before its checkpoint; `metrics` are those of metrics.jsonl."""

    def on_end(self, trainer: Any, summary: dict[str, Any]) -> None:
        """Handle the end of the run, after the test; `summary` is the content of summary.json."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for checkpoints: tensors and plain values. That of rank 0 is saved, for all ranks."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint."""


def is_custom(name: str) -> bool:
    """Return whether a name is that of a custom part."""
    return ":" in name


def names_in(settings: Any) -> Iterator[tuple[str, str]]:
    """Yield the part and the name of each custom part in a configuration, or in nested plain settings."""
    for part, (key, _) in PARTS.items():
        value = value_at(settings, key)
        for name in value if isinstance(value, list | tuple) else [value]:
            if isinstance(name, str) and NAME.fullmatch(name):
                yield part, name


def value_at(settings: Any, key: str) -> Any:
    """Return the value of a dotted key in a configuration or nested plain settings, or None; for "", all settings."""
    for step in filter(None, key.split(".")):
        settings = settings.get(step) if isinstance(settings, Mapping) else getattr(settings, step, None)
    return settings


def allow(names: Iterable[str]) -> None:
    """Allow names that the user gave to be imported; those of a script or notebook cannot be."""
    for name in names:
        if not name.startswith("__main__:"):
            _allowed.setdefault(name, None)


def register(function: Function) -> str:
    """Allow a function or class that is given as an object, and return its name."""
    module, attribute = getattr(function, "__module__", None), getattr(function, "__name__", None)
    name = f"{module}:{attribute}"
    if not NAME.fullmatch(name):
        raise ConfigError(f"{function!r} cannot be a custom part; define a function or class with a name of its own")
    importable = module != "__main__" and getattr(sys.modules.get(str(module)), str(attribute), None) is function
    _allowed[name] = None if importable else function
    return name


def short_name(name: str) -> str:
    """Return the name of the function alone, which is the key of a callback's options."""
    return name.partition(":")[2]


def export_parts(names: Iterable[str]) -> dict[str, Function | None]:
    """Return what another process needs to use these parts, see `import_parts`; to be sent by cloudpickle."""
    return {name: _allowed[name] for name in names if name in _allowed}


def import_parts(parts: Mapping[str, Function | None]) -> None:
    """Allow the parts that another process of the same run sent."""
    _allowed.update(parts)


def require_allowed(names: Iterable[tuple[str, str]]) -> None:
    """Raise a ConfigError unless all names, each with its part, may be imported."""
    for part, name in names:
        if name not in _allowed and name.startswith("__main__:"):
            raise ConfigError(
                f"{PARTS[part].key}: {name} was defined in a script or notebook; pass it to fit() there again"
            )
        if name not in _allowed:
            raise ConfigError(
                f"{PARTS[part].key}: {name} is not imported: the name comes from the folder of a run or sweep, or from "
                "an export, which may be another person's\n"
                "  if you know the code, add --trust (in Python: trust=True)"
            )


def is_allowed(name: str) -> bool:
    """Return whether a name may be imported."""
    return name in _allowed


def import_function(part: str, name: str) -> Function:
    """Import a function.

    Raises:
        ConfigError: it may not be imported, or cannot be.
    """
    require_allowed([(part, name)])
    if (given := _allowed[name]) is not None:
        return given
    key = PARTS[part].key
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # the densenet-dist command, unlike python -m, does not add it
        sys.path.append(os.getcwd())  # last, so that a file of the user replaces no installed package
    try:
        found = import_module(module)
    except Exception as error:
        problem = _described(error)
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module}.".startswith(f"{missing}."):
            problem = (
                f"there is no module {missing} on {os.uname().nodename}\n"
                f"  start in the folder with {missing.partition('.')[0]}, or install it (on all nodes of a cluster)"
            )
        raise ConfigError(f"{key}: {name} cannot be imported: {problem}") from error
    function: Any = getattr(found, attribute, None)
    if not callable(function):
        near = difflib.get_close_matches(attribute, dir(found), n=1)
        raise ConfigError(f"{key}: {module} has no function {attribute}{f'; did you mean {near[0]}?' if near else ''}")
    return cast(Function, function)


@contextmanager
def user_code_errors(key: str, name: str, kind: type[DenseNetDistError] = ConfigError) -> Iterator[None]:
    """Re-raise an exception of the user's code as `kind`, naming the code.

    Not converted are errors of this package, and PyTorch's errors for lost ranks, failing devices and lack of memory,
    after which a run is restarted.
    """
    try:
        yield
    except DenseNetDistError:
        raise
    except Exception as error:
        kinds = {each.__name__ for each in type(error).__mro__}  # PyTorch is not imported here
        of_another_rank = isinstance(error, RuntimeError) and "gloo" in str(error)
        if of_another_rank or is_out_of_memory(error) or kinds & {"DistError", "AcceleratorError"}:
            raise
        raise kind(f"{key}: {name} failed: {_described(error)}") from error


def step_errors(part: str, config: Any) -> AbstractContextManager[None]:
    """Do what `user_code_errors` does for a part of a configuration while training, if it is a custom one."""
    key = PARTS[part].key
    name = value_at(config, key)
    return user_code_errors(key, name, TrainingError) if is_custom(name) else nullcontext()


def trust_option() -> str:
    """Return the option that commands need for the runs of this process: empty if it uses no custom parts."""
    return " --trust" if _allowed else ""


def _described(error: BaseException) -> str:
    """Describe an error with the last line of code outside of installed packages."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _is_users(file: str) -> bool:
    package, library = os.path.dirname(__file__), sysconfig.get_path("stdlib")
    return not (file.startswith((f"{package}/", f"{library}/", "<frozen")) or "-packages/" in file)
