"""Curves over axes: losses, precision and recall, anything.  Nothing here ever opens a window.

matplotlib is imported where a figure is made, not above: it takes most of a second, and drawing boxes or
printing a help text needs none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minidet.plots.boxes import COLOURS, INK, colour_of, ready

Curves = dict[str, tuple[np.ndarray, np.ndarray]]


def loss_curves(history: dict[str, Sequence[float]], path: str | Path) -> Path:
    """Plot what training recorded: losses, raw and smoothed, and below them validation AP if any.

    `history` holds the columns of a run's metrics.csv: "position", the images seen so far, is the x axis;
    "loss", "classification" and "box" make the upper panel, names that start with "AP" the lower.  None or
    NaN stands where nothing was measured.
    """
    columns = {name: np.array(values, np.float64) for name, values in history.items()}
    there = {name: np.isfinite(values) for name, values in columns.items()}
    measured = [name for name in columns if name.startswith("AP") and there[name].any()]
    figure, panels = _figure(7.5, 6.5 if measured else 4, panels=2 if measured else 1)
    tops = []
    for k, name in enumerate(("loss", "classification", "box")):
        x, y = columns["position"][there[name]], columns[name][there[name]]
        panels[0].plot(x, y, color=COLOURS[k], linewidth=0.6, alpha=0.25)
        panels[0].plot(x, _smoothed(y), color=COLOURS[k], linewidth=1.8, label=name)
        tops += [float(np.quantile(y, 0.98))] if len(y) else []
    # The first steps may tower over the rest: show them only as far as the rest stays legible.
    panels[0].set_ylim(0, 1.15 * max(tops, default=1.0) or 1.0)
    finish(panels[0], y="loss")
    for k, name in enumerate(measured):
        x, y = columns["position"][there[name]], columns[name][there[name]]
        panels[1].plot(x, y, color=COLOURS[k], marker="o", markersize=3.5, label=name)
        panels[1].annotate(f" {y[-1]:.3f}", (x[-1], y[-1]), color=COLOURS[k], va="center")
        panels[1].set_ylim(0, 1)
    finish(panels[-1], x="training images seen", y="on validation images" if measured else "loss")
    panels[-1].xaxis.set_major_formatter("{x:,.0f}")
    return save(figure, path)


def precision_recall(curves: Curves, path: str | Path, *, title: str = "IoU 0.50") -> Path:
    """Plot the curve of each class, named with the area under it, and the mean of all.

    Shapes:
        curves: by class, recalls (M,), the same for all classes, and precisions (M,)
    """
    figure, (axes,) = _figure(7.2, 5)
    # More lines than a dozen cannot be told apart: then they are only the cloud around the mean.
    few = len(curves) <= 12
    style = {"linewidth": 1.6} if few else {"linewidth": 0.7, "alpha": 0.45}
    for k, (name, (recalls, precisions)) in enumerate(curves.items()):
        label = f"{np.mean(precisions):.3f}  {name}" if few else None
        axes.plot(recalls, precisions, color=colour_of(k), label=label, **style)
    if curves:
        mean = np.mean([precisions for _, precisions in curves.values()], axis=0)
        label = f"{np.mean(mean):.3f}  mean of {len(curves)} classes"
        axes.plot(recalls, mean, color=INK, linewidth=2.4, linestyle="--", label=label)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    finish(axes, x="recall: objects found", y="precision: detections that are right", title=title, outside=True)
    return save(figure, path)


def lines(
    curves: Curves, path: str | Path, *, x: str = "", y: str = "", title: str = "", log: str = ""
) -> Path:
    """Plot named curves over one pair of axes; `log` may name axes to make logarithmic, as in "xy".

    Shapes:
        curves: by name, xs (M,) and ys (M,)
    """
    figure, (axes,) = _figure(6.5, 4.2)
    for k, (name, (xs, ys)) in enumerate(curves.items()):
        axes.plot(xs, ys, color=colour_of(k), linewidth=1.8, label=name)
    axes.set(**{f"{axis}scale": "log" for axis in log})
    finish(axes, x=x, y=y, title=title)
    return save(figure, path)


def bars(
    values: dict[str, float], path: str | Path, *, x: str = "", title: str = "", limit: tuple[str, float] | None = None
) -> Path:
    """Plot one number per name, from the top down, each written behind its bar; `limit` names a line across."""
    figure, (axes,) = _figure(6.5, 1.2 + 0.4 * len(values))
    drawn = axes.barh(list(values), list(values.values()), color=COLOURS[0], height=0.62)
    axes.bar_label(drawn, fmt="%.3g", padding=4)
    axes.invert_yaxis()
    if limit:
        axes.axvline(limit[1], color=INK, linestyle="--", linewidth=1.4, label=limit[0])
    axes.margins(x=0.12)
    finish(axes, x=x, y="", title=title)
    return save(figure, path)


def _smoothed(y: np.ndarray) -> np.ndarray:
    """A weighted mean over a tenth of the curve, over less at its ends."""
    window = np.hanning(len(y) // 20 * 2 + 3)[1:-1]
    return np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same") if len(y) else y


def _figure(width: float, height: float, panels: int = 1):
    """A figure of so many inches, and its panels from top to bottom, which share the x axis."""
    from matplotlib.figure import Figure  # not pyplot: no global state, and no display is asked for

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]


def finish(axes, *, x: str = "", y: str, title: str = "", outside: bool = False) -> None:
    """The look all plots share: open frame, faint grid, a legend if anything was named."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, loc="left", fontsize=11)
    if axes.get_legend_handles_labels()[0]:
        where = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if outside else {}
        axes.legend(frameon=False, **where)


def save(figure, path: str | Path) -> Path:
    """Write the figure as the suffix says, making folders as needed."""
    path = ready(path)
    figure.savefig(path, dpi=120)
    return path
