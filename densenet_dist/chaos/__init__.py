"""Training under injected faults, each compared with a run that nothing happened to."""
