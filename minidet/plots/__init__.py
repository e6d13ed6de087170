"""Arrays in, pictures out.  Only this folder imports matplotlib."""

from minidet.plots.boxes import COLOURS, INK, colour_of, contact_sheet, draw_boxes, save_image
from minidet.plots.curves import bars, lines, loss_curves, precision_recall

__all__ = [
    "COLOURS",
    "INK",
    "bars",
    "colour_of",
    "contact_sheet",
    "draw_boxes",
    "lines",
    "loss_curves",
    "precision_recall",
    "save_image",
]
