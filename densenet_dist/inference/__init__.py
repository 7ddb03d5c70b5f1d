"""Use trained models: exported files and predictions. Does not import Ray."""
