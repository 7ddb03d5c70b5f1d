"""Reports of runs: HTML pages and figures."""
