"""Renders ``report.html`` from the report dict: one page, with its pictures inside."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from cosmos_ray.report import charts, style
from cosmos_ray.report.filmstrip import draw_filmstrip
from cosmos_ray.report.headline import p_value

if TYPE_CHECKING:
    from cosmos_ray.report.trace import EpisodeTrace


def render_page(report: dict, trace: EpisodeTrace | None) -> str:
    """The HTML text. Every number in it is one of ``report``."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters.update(percent=percent, number=number, p_value=p_value)
    template = environment.from_string((resources.files("cosmos_ray.report") / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(report=report, several_rounds=several_rounds(report), images=_images(report, trace))


def html_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of texts, which are escaped."""
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return "<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + f"</tr>{cells}</table>"


def several_rounds(report: dict) -> bool:
    """Whether the page tells rounds apart: of one round, the table of the arms says all."""
    return any(row["round"] > 1 for row in report["rounds"])


def write_page(path: Path, text: str) -> None:
    """Replace the file ``path``, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def number(value: Any, digits: int = 3) -> str:
    """A number with a fixed count of digits; a dash for None."""
    return "–" if value is None else f"{value:,.{digits}f}"


def _images(report: dict, trace: EpisodeTrace | None) -> dict[str, str]:
    """The figures that the report has data for, as data URIs."""
    draw: dict[str, Callable[[], Figure]] = {}
    if report["arms"]:
        draw["arms"] = lambda: charts.draw_arms(report["arms"])
    if report["training"]:
        draw["training"] = lambda: charts.draw_training(report["training"])
    if report["rollouts_by_version"]:
        draw["versions"] = lambda: charts.draw_versions(report["rollouts_by_version"])
    if several_rounds(report):
        draw["rounds"] = lambda: charts.draw_rounds(report["rounds"])
    if report["planning"]:
        draw["planning"] = lambda: charts.draw_planning(report["planning"])
    if report["values"]:
        draw["calibration"] = lambda: charts.draw_calibration(list(report["values"].values())[-1]["calibration"])
    if trace is not None:
        draw["filmstrip"] = lambda: draw_filmstrip(trace)
    return {name: style.data_uri(style.png(make())) for name, make in draw.items()}
