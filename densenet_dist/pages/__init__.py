"""Self-contained HTML pages: templates, style and inline SVG figures for reports of runs and sweeps."""
