"""Pictures of a sweep's page, drawn as those of all pages are."""

from densenet_dist.pages.svg import SHADES, STATUSES, colour, drawing, new_figure, to_svg

__all__ = ["SHADES", "STATUSES", "colour", "drawing", "new_figure", "to_svg"]
