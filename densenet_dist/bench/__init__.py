"""Measurements for users: ``densenet-dist bench``."""
