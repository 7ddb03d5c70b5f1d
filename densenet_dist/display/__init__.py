"""Output while a run trains: on a terminal, in a pipe, as JSON lines, in a notebook."""
