"""Measurements that a user can make: ``densenet-dist bench``."""
