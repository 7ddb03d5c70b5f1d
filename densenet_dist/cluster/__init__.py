"""Where training runs: the only package that knows Ray."""
