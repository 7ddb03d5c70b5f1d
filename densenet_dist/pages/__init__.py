"""Self-contained HTML pages: templates, style, and figures as inline SVG; for reports of runs and sweeps."""
