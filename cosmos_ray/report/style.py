"""Palette, fonts and axes of all figures, and figures as PNG. Does not use pyplot, so it changes nothing global."""

from __future__ import annotations

import base64
import io

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette, distinct for every common kind of colour blindness.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, MUTED, GRID, PAPER = "#1d2733", "#5d6875", "#e3e7eb", "#ffffff"
ARMS = (MUTED, BLUE, VERMILION, GREEN, PURPLE, ORANGE)  #: colours of evaluation arms, in order

FONT = 9.0
DPI = 160


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **grid) -> tuple[Figure, list[Axes]]:
    """A figure of ``width`` x ``height`` inches and its ``rows * columns`` styled axes, row by row."""
    made = blank(width, height)
    made.set_layout_engine("constrained")
    axes = [axis for row in made.subplots(rows, columns, squeeze=False, **grid) for axis in row]
    for axis in axes:
        tidy(axis)
    return made, axes


def blank(width: float, height: float) -> Figure:
    """An empty white figure, drawn by Agg."""
    made = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(made)
    return made


def tidy(axis: Axes, grid: str = "y") -> None:
    """Apply the common style; ``grid`` is "x", "y", "both" or ""."""
    axis.set_facecolor(PAPER)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(MUTED)
        axis.spines[side].set_linewidth(0.7)
    axis.tick_params(colors=MUTED, labelsize=FONT - 1, labelcolor=INK, width=0.7, length=3)
    axis.grid(False)
    if grid:
        axis.grid(True, axis=grid, color=GRID, linewidth=0.7)


def label(axis: Axes, x: str = "", y: str = "", title: str = "") -> None:
    """Axis labels and a left-aligned title."""
    axis.set_xlabel(x, fontsize=FONT, color=INK)
    axis.set_ylabel(y, fontsize=FONT, color=INK)
    if title:
        axis.set_title(title, fontsize=FONT + 0.5, color=INK, loc="left", fontweight="bold")


def legend(axis: Axes, **options) -> None:
    """A legend without a frame."""
    axis.legend(frameon=False, fontsize=FONT - 1, labelcolor=INK, handlelength=1.6, **options)


def png(made: Figure) -> bytes:
    """The figure as PNG. It has no metadata, so equal figures give equal bytes."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=DPI, facecolor=PAPER, metadata={"Software": None})
    return buffer.getvalue()


def data_uri(image: bytes) -> str:
    """PNG bytes as a data URI, for the ``src`` of an image."""
    return "data:image/png;base64," + base64.b64encode(image).decode()
