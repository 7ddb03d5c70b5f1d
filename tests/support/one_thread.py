"""A fixture for folders whose tests train in this process; a `conftest.py` that imports it has it for its folder."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Nets this small gain nothing from more, and the golden losses were written with one.

    Before every test, because the command sets its own number.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
