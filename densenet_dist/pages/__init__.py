"""HTML pages that need nothing but themselves: one frame, one style, pictures as SVG; of a run and of a sweep."""
