"""One thread for all of them."""

from one_thread import one_thread

__all__ = ["one_thread"]
