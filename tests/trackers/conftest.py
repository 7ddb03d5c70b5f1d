"""What the tests of trackers share."""

from one_thread import one_thread

__all__ = ["one_thread"]
