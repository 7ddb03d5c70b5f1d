"""Kernels of the fused dense block, by device."""
