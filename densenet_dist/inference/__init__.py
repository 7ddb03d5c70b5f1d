"""Using what was trained: exported files, predictions on pictures, and a page to try them on. Knows no Ray."""
