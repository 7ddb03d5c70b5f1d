"""Options of custom parts: the keyword-only arguments of their functions, as settings under ``options``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass, make_dataclass, replace
from functools import lru_cache, partial
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticSerializationError

from densenet_dist.custom import (
    PARTS,
    Callback,
    Function,
    import_function,
    is_allowed,
    is_custom,
    names_in,
    register,
    short_name,
    value_at,
)
from densenet_dist.errors import ConfigError
from densenet_dist.schema import Config, ModelConfig, OptionsConfig
from densenet_dist.settings import STRICT, Settings
from densenet_dist.yaml_settings import merge


def register_functions(settings: dict[str, Any]) -> None:
    """Replace functions in nested plain settings by names; arguments of a ``functools.partial`` become options."""
    for part, (key, _) in PARTS.items():
        group_key, _, last = key.rpartition(".")
        group = value_at(settings, group_key)
        value = group.get(last) if isinstance(group, dict) else None
        if isinstance(value, list | tuple):
            group[last] = [_name_of(settings, part, each) for each in value]
        elif callable(value):
            group[last] = _name_of(settings, part, value)


def _name_of(settings: dict[str, Any], part: str, value: Any) -> Any:
    if isinstance(value, Callback):
        raise ConfigError(
            f"callbacks: give the class {type(value).__name__}, not an object; functools.partial sets its options"
        )
    if not callable(value):
        return value
    options = {}
    if isinstance(value, partial):
        if value.args:
            raise ConfigError(f"{PARTS[part].key}: {value!r} has arguments without keywords; give name=value")
        value, options = value.func, {key: _plain(each) for key, each in value.keywords.items()}
    name = register(value)
    if options:
        section = settings.setdefault("options", {}).setdefault(part, {})
        section |= {short_name(name): options} if part == "callbacks" else options
    return name


def _plain(value: Any) -> Any:
    """Convert a number of NumPy or PyTorch to one of Python."""
    return value.item() if getattr(value, "shape", None) == () else value


def check_options(config: Config) -> Config:
    """Return a configuration with checked options of its custom parts, complete with their defaults.

    Options of parts that may not be imported, such as those of another person's run, are not checked.

    Raises:
        ConfigError: an option or a function is wrong.
    """
    given = dict(vars(config.options))
    named = list(names_in(config))
    used = {part for part, _ in named}
    for part, options in given.items():
        if options and part not in used:
            key = PARTS[part].key
            raise ConfigError(f"options.{part}: {key}={value_at(config, key) or '[]'} has no options; remove them")
    unknown = {part for part, name in named if not is_allowed(name)}
    functions = tuple((part, name, load(part, name)) for part, name in named if part not in unknown)
    if not functions:
        return config
    for part, name, _ in functions:
        if part == "callbacks":
            given[part] = {short_name(name): {}} | given[part]
    settings = _settings_of(functions)
    checked = settings.validate({"options": {part: given[part] for part, *_ in functions}})
    return replace(config, options=OptionsConfig(**given | settings.to_dict(checked)["options"]))


@lru_cache(maxsize=64)
def _settings_of(functions: tuple[tuple[str, str, Function], ...]) -> Settings[Any]:
    """Return the settings ``options`` of these functions, each with its part and its name."""
    kinds: dict[str, Any] = {part: options_type(part, function) for part, _, function in functions}
    if "callbacks" in kinds:
        of_callbacks = {short_name(name): options_type(part, f) for part, name, f in functions if part == "callbacks"}
        kinds["callbacks"] = _group(of_callbacks)
    whole = _group({"options": _group(kinds)})
    return Settings(whole, lambda _: (), _keys(whole))


def _group(kinds: Mapping[str, type]) -> type[Any]:
    """Make a dataclass of settings with fields of these types."""
    return make_dataclass("Group", kinds.items(), namespace={"__pydantic_config__": STRICT})


def _keys(kind: Any) -> dict[str, Any]:
    """Return the names of a dataclass's fields, nested as they are."""
    return {each.name: _keys(each.type) if is_dataclass(each.type) else None for each in fields(kind)}


def merge_layer(values: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Merge a layer into nested plain settings.

    Options of custom parts that the layer replaces by others are dropped; so are the settings of DenseNets if the layer
    names a custom model.
    """
    for part, (key, _) in PARTS.items():
        old, new = value_at(values, key), value_at(layer, key)
        options = value_at(values, f"options.{part}")
        if old is None or new in (None, old) or not isinstance(options, dict):
            continue
        kept = map(short_name, new) if part == "callbacks" and isinstance(new, list) else ()
        values["options"][part] = {each: options[each] for each in kept if each in options}
    model, variant = values.get("model"), value_at(layer, "model.variant")
    if isinstance(model, dict) and isinstance(variant, str) and is_custom(variant):
        values["model"] = {key: value for key, value in model.items() if key not in ModelConfig().network}
    merge(values, layer)


def load(part: str, name: str) -> Function:
    """Import a function. Errors are those of `import_function` and `options_type`."""
    function = import_function(part, name)
    options_type(part, function)
    return function


def bind(part: str, name: str, options: Mapping[str, Any]) -> Function:
    """Return the function of a part with its options filled in. Errors are those of `load`."""
    function = load(part, name)
    try:
        typed: Any = TypeAdapter(options_type(part, function)).validate_json(json.dumps(options))
    except (ValidationError, ValueError) as error:
        raise ConfigError(f"options.{part}: {name} does not accept them: {error}") from None
    return partial(function, **vars(typed))


@lru_cache
def options_type(part: str, function: Function) -> type:
    """Return a dataclass of a function's options, with their types and defaults.

    Raises:
        ConfigError: the function does not have the arguments of its part, or an option has no usable type.
    """
    key, arguments = PARTS[part]
    name = f"{function.__module__}:{function.__name__}"
    wanted = f"({', '.join([*arguments, '*', 'option: type = default', '...'])})"
    try:
        parameters = inspect.signature(function).parameters.values()
        hints = get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
    except (ValueError, TypeError, NameError, AttributeError) as error:
        raise ConfigError(f"{key}: the arguments of {name} cannot be read: {error}; define it as {wanted}") from error
    options = [one for one in parameters if one.kind is one.KEYWORD_ONLY]
    others = [one for one in parameters if one.kind is not one.KEYWORD_ONLY]
    if len(others) != len(arguments) or any(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in others):
        given = ", ".join(str(one) for one in parameters)
        raise ConfigError(f"{key}: {name}({given}) must take {wanted}")
    if untyped := [one.name for one in options if one.name not in hints]:
        raise ConfigError(
            f"{key}: the option {untyped[0]} of {name} has no type; write {untyped[0]}: float, for example"
        )
    fields = []
    for one in options:
        default = field() if one.default is one.empty else field(default_factory=partial(_same, one.default))
        fields.append((one.name, hints[one.name], default))
    rules = STRICT | {"validate_default": True}
    found = make_dataclass(short_name(name), fields, kw_only=True, namespace={"__pydantic_config__": rules})
    try:
        TypeAdapter(found)
        for one in options:
            if one.default is not one.empty:
                TypeAdapter(hints[one.name]).dump_python(one.default, mode="json", warnings=False)
    except (PydanticUserError, PydanticSerializationError, TypeError) as error:
        raise ConfigError(f"{key}: an option of {name} has a type that a file cannot hold: {error}") from error
    return found


def _same(value: Any) -> Any:
    return value
