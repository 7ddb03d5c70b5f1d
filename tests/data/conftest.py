"""Fixtures: small sets of the form of the official ones."""

from collections.abc import Callable

import pytest
from toy_cifar import Toy, make_toy

from densenet_dist.data import cifar


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Toy]:
    """Both sets made small, by name; `load_dataset` takes them for the official ones."""
    made = {name: make_toy(spec) for name, spec in cifar.SPECS.items()}
    for name, toy in made.items():
        monkeypatch.setitem(cifar.SPECS, name, toy.spec)
    return made.__getitem__


@pytest.fixture
def toy(toys: Callable[[str], Toy]) -> Toy:
    """CIFAR-10 made small."""
    return toys("cifar10")
