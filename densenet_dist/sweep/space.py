"""The search space of a sweep: a domain of values for each dotted configuration key."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from densenet_dist.errors import ConfigError

Number: TypeAlias = int | float
Value: TypeAlias = Any
"""A configuration value: a scalar, or a list."""


@dataclass(frozen=True)
class Choice:
    """One of a list of values."""

    values: tuple[Value, ...]

    def sample(self, rng: random.Random) -> Value:
        """Draw a value uniformly."""
        return rng.choice(self.values)

    @property
    def ends(self) -> tuple[Value, ...]:
        """Values to check: if they are valid, all values are."""
        return self.values

    @property
    def count(self) -> int:
        """The number of values."""
        return len(self.values)

    def at(self, i: int) -> Value:
        """Return the i-th value of a grid."""
        return self.values[i]

    def distribution(self) -> Any:
        """Return the distribution for Optuna."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution([encode_value(value) for value in self.values])

    def describe(self) -> dict[str, Any]:
        """Return the domain as written in a sweep file."""
        return {"choice": list(self.values)}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        integer: whole numbers only.
        log: uniform in the logarithm.
        step: distance between neighboring values, starting at `low`; None: any value.
    """

    low: Number
    high: Number
    integer: bool = False
    log: bool = False
    step: Number | None = None

    def sample(self, rng: random.Random) -> Number:
        """Draw a value uniformly, or uniformly in the logarithm if `log`."""
        if self.log:
            drawn = math.exp(rng.uniform(math.log(self.low), math.log(self.high + self.integer)))
            drawn = min(max(drawn, self.low), self.high)
            return int(drawn) if self.integer else drawn
        return rng.uniform(self.low, self.high) if self.count is None else self.at(rng.randrange(self.count))

    def distribution(self) -> Any:
        """Return the distribution for Optuna."""
        from optuna.distributions import FloatDistribution, IntDistribution

        low, high = self.ends
        if self.integer:
            return IntDistribution(int(low), int(high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(low, high, log=self.log, step=self.step)

    @property
    def ends(self) -> tuple[Number, ...]:
        """The lowest and the highest."""
        return (self.low, self.high if self.count is None else self.at(self.count - 1))

    @property
    def count(self) -> int | None:
        """The number of values; None for a continuous range."""
        if self.step is not None:
            return math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return int(self.high) - int(self.low) + 1 if self.integer else None

    def at(self, i: int) -> Number:
        """Return the i-th value of a grid."""
        value = self.low + i * (self.step or 1)
        return value if self.integer else float(f"{value:.12g}")

    def describe(self) -> dict[str, Any]:
        """Return the domain as written in a sweep file."""
        kind = ("loginteger" if self.log else "integer") if self.integer else ("loguniform" if self.log else "uniform")
        described: dict[str, Any] = {kind: [self.low, self.high]}
        return described if self.step is None else described | {"step": self.step}


Domain: TypeAlias = Choice | Range
Space: TypeAlias = Mapping[str, Domain]
KINDS: Final = frozenset(("choice", "uniform", "loguniform", "integer", "loginteger"))
_FORMS: Final = "{choice: [a, b]}, or {uniform: [low, high]}, or likewise loguniform, integer or loginteger"
_JSON: Final = "json:"


def read_domain(value: Any) -> Domain:
    """Read the domain of one key from a sweep file.

    Raises:
        ConfigError: it is not a domain; the caller puts the key in front of the message.
    """
    if isinstance(value, list):
        value = {"choice": value}
    if not isinstance(value, Mapping) or len(found := KINDS & set(value)) != 1 or set(value) - found - {"step"}:
        raise ConfigError(f"must be {_FORMS}; uniform and integer also accept a step; got {_shown(value)}")
    [kind] = found
    return _read_choice(value) if kind == "choice" else _read_range(kind, value[kind], value.get("step"))


def _read_choice(value: Mapping[str, Any]) -> Choice:
    values = value["choice"]
    if not isinstance(values, list) or not values:
        raise ConfigError(f"choice needs a list of at least one value, not {_shown(values)}")
    if "step" in value:
        raise ConfigError("a choice has no step")
    for number, item in enumerate(values):
        if item in values[:number]:
            raise ConfigError(f"the choice {_shown(item)} is given twice")
    return Choice(tuple(values))


def _read_range(kind: str, ends: Any, step: Any) -> Range:
    integer, log = kind.endswith("integer"), kind.startswith("log")
    allowed = (int,) if integer else (int, float)
    if not isinstance(ends, list) or len(ends) != 2 or not all(type(end) in allowed for end in ends):
        raise ConfigError(f"{kind} needs [low, high] in {'whole ' * integer}numbers, not {_shown(ends)}")
    low, high = ends
    if not -1e300 < low < high < 1e300:  # integers may be larger than any float
        raise ConfigError(f"{kind} needs a low end below its high end, not {_shown(ends)}")
    if log and low <= 0:
        raise ConfigError(f"{kind} needs a low end above 0, not {low:g}")
    finest = 0 if integer else 1e-11 * max(abs(low), abs(high))  # values have 12 digits, and must differ
    if step is not None and (log or type(step) not in allowed or not finest < step <= high - low):
        raise ConfigError(f"a step (uniform, integer) must be above 0 and fit into {_shown(ends)}, not {_shown(step)}")
    if not integer:
        low, high = float(low), float(high)
    return Range(low, high, integer, log, step)


def size(space: Space) -> int | None:
    """Return the number of combinations of a grid; None if a range is continuous."""
    counts = [domain.count for domain in space.values()]
    return math.prod(count for count in counts if count is not None) if None not in counts else None


def grid(space: Space) -> Iterator[dict[str, Value]]:
    """Yield every combination; the last key varies fastest."""
    for indices in itertools.product(*(range(domain.count or 0) for domain in space.values())):
        yield {key: domain.at(i) for (key, domain), i in zip(space.items(), indices, strict=True)}


def sample(space: Space, rng: random.Random) -> dict[str, Value]:
    """Draw one combination, each key independently."""
    return {key: domain.sample(rng) for key, domain in space.items()}


def samples(space: Space, rng: random.Random, count: int) -> list[dict[str, Value]]:
    """Draw combinations; in a finite space, none is repeated before all were drawn."""
    combinations = size(space)
    found: list[dict[str, Value]] = []
    seen: set[str] = set()
    while len(found) < count:
        point = sample(space, rng)
        seen.add(json.dumps(point))
        if len(seen) > len(found) or len(seen) == combinations:
            found.append(point)
    return found


def encode_value(value: Value) -> Value:
    """Encode a value for Tune and Optuna: other values than scalars as JSON."""
    return value if isinstance(value, (bool, int, float, str)) else _JSON + json.dumps(value)


def encode(overrides: Mapping[str, Value]) -> dict[str, Value]:
    """Apply `encode_value` to each key."""
    return {key: encode_value(value) for key, value in overrides.items()}


def decode(encoded: Mapping[str, Value]) -> dict[str, Value]:
    """Invert `encode`."""
    return {
        key: json.loads(value.removeprefix(_JSON)) if isinstance(value, str) and value.startswith(_JSON) else value
        for key, value in encoded.items()
    }


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) < 70 else f"{text[:50]}..."
