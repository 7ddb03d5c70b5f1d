"""Searching settings: what a sweep file says, the space it spans, and what its trials left behind. Knows no Ray."""
