"""Send the records of a run to W&B and MLflow; their packages are imported in the sending thread."""
