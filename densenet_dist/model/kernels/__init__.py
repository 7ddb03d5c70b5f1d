"""Kernels of the fused dense block, by device."""

from densenet_dist.model.kernels.choice import choose_kernels, unavailable

__all__ = ["choose_kernels", "unavailable"]
