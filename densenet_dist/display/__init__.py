"""What is seen of a run while it trains: on a terminal, in a pipe, as JSON for programs, in a notebook."""
