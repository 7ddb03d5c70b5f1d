"""Sweeps: sweep files, search spaces, results and pages; independent of Ray."""
