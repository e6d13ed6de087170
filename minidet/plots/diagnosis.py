"""One page about a data set and what training on it will be like."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minidet.plots.boxes import INK
from minidet.plots.curves import finish, save

SIGNAL = {"must fix": "#c62828", "warning": "#e08a00", "note": "#607080", "ok": "#2e7d32"}
REACH = ("#1b7f5c", "#e9b44c", "#b3365b")
"""Objects with an anchor of their own, with one that is ignored, with none; apart also for the colour-blind."""
PARTS = ("#607080", "#8a5cf6", "#1f77ff", "#00b8c4", "#ff8c00", "#c6e300")
DOTS = 4_000


def diagnosis_page(
    path: str | Path,
    *,
    title: str,
    verdict: str,
    signal: str,
    findings: Sequence[tuple[str, str]],
    sides: np.ndarray,
    iou: np.ndarray,
    thresholds: tuple[float, float],
    limits: tuple[np.ndarray, np.ndarray],
    shares: dict[str, tuple[int, tuple[float, float, float]]],
    heart: Sequence[float],
    goal: float,
    seconds: dict[str, float],
    memory: dict[str, float],
    costs: str,
) -> Path:
    """Draw the findings, the objects and their anchors, what was learned by heart, and the costs.

    Shapes:
        sides: (M, 2), width and height of each object after resizing
        iou: (M,), of its best anchor
        limits: sides (P,), and the best possible IoU (P, P) of a box of height sides[i], width sides[j]
    Units: pixels; `thresholds` are (low, high); `goal` a share of the first loss; memory in bytes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 10))
    head = figure.add_axes((0, 0.94, 1, 0.06), facecolor=SIGNAL[signal], xticks=[], yticks=[])
    head.text(0.015, 0.5, f"{title}   {verdict}", color="white", fontsize=14, va="center", weight="bold")
    _write(figure, findings)
    _objects(figure.add_axes((0.47, 0.53, 0.25, 0.36)), sides, iou, thresholds, limits)
    _shares(figure.add_axes((0.85, 0.32, 0.13, 0.57)), shares, thresholds)
    _heart(figure.add_axes((0.47, 0.28, 0.25, 0.16)), heart, goal)
    milliseconds = {name: 1e3 * value for name, value in seconds.items()}
    _bar(figure.add_axes((0.47, 0.12, 0.23, 0.05)), milliseconds, "a step, in ms")
    _bar(figure.add_axes((0.74, 0.12, 0.22, 0.05)), {n: v / 2**20 for n, v in memory.items()}, "peak memory, in MiB")
    figure.text(0.47, 0.03, costs, fontsize=12, color=INK, weight="bold")
    return save(figure, path)


def _write(figure, findings: Sequence[tuple[str, str]]) -> None:
    """Findings one below the other, the worst first, as many as there is room for."""
    y, height = 0.92, 0.0165
    for n, (severity, text) in enumerate(findings):
        wrapped = [part for line in text.split("\n") for part in textwrap.wrap(line, 74, subsequent_indent="   ")]
        if y - height * len(wrapped) < 0.03:
            figure.text(0.02, y, f"... and {len(findings) - n} more, in the text", fontsize=9, va="top", color=INK)
            return
        figure.text(0.02, y, severity.upper(), fontsize=9, va="top", color=SIGNAL[severity], weight="bold")
        figure.text(0.02, y - height, "\n".join(wrapped), fontsize=9, va="top", color=INK, linespacing=1.25)
        y -= height * (len(wrapped) + 1.9)
    if not findings:
        figure.text(0.02, y, "Nothing was found that needs attention.", fontsize=11, va="top", color=SIGNAL["ok"])


def _objects(axes, sides: np.ndarray, iou: np.ndarray, thresholds: tuple[float, float], limits) -> None:
    """Every object at its width and height, and the closed-form border of what anchors reach."""
    rows = np.unique(np.linspace(0, len(sides) - 1, DOTS).astype(int)) if len(sides) else []
    kind = 2 - np.searchsorted(thresholds, iou[rows], side="right")
    for k, colour in enumerate(REACH):
        axes.scatter(*sides[rows][kind == k].T, s=5, color=colour, alpha=0.6, linewidths=0)
    at, best = limits
    drawn = axes.contour(at, at, best, levels=thresholds, colors=INK, linewidths=1, linestyles=("dotted", "dashed"))
    axes.clabel(drawn, fmt="IoU %.1f", fontsize=8)
    axes.set(xscale="log", yscale="log", xlim=(at[0], at[-1]), ylim=(at[0], at[-1]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    finish(axes, x="width, px after resizing", y="height", title="objects, and what anchors can reach")


def _shares(axes, shares: dict[str, tuple[int, tuple[float, float, float]]], thresholds: tuple[float, float]) -> None:
    names = [f"{name}  ({count:,})" for name, (count, _) in shares.items()][::-1]
    parts = np.array([share for _, share in shares.values()]).reshape(-1, 3)[::-1]
    low, high = thresholds
    start = np.zeros(len(parts))
    for n, label in enumerate((f"IoU ≥ {high:g}", f"≥ {low:g}", f"< {low:g}")):
        axes.barh(names, parts[:, n], left=start, color=REACH[n], label=label)
        start += parts[:, n]
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.tick_params(labelsize=8)
    finish(axes, y="", title="best anchor of the objects")
    if len(parts):
        axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.3, -0.04), fontsize=9)


def _heart(axes, heart: Sequence[float], goal: float) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(heart):
        axes.plot(heart, color=REACH[0], linewidth=1.8)
        axes.axhline(goal * heart[0], color=INK, linestyle="dashed", linewidth=1)
        axes.set_ylim(0, 1.1 * max(heart))
    else:
        axes.text(0.5, 0.5, "not tried", transform=axes.transAxes, ha="center", color=INK)
    finish(axes, x="steps", y="loss", title=f"learned by heart: goal {goal:.0%}")


def _bar(axes, parts: dict[str, float], title: str) -> None:
    """One bar of parts, each named below in its colour."""
    start = 0.0
    for (name, value), colour in zip(parts.items(), PARTS, strict=False):
        axes.barh([0], [value], left=start, color=colour, label=f"{name} {value:,.0f}")
        start += value
    axes.set_yticks([])
    finish(axes, y="", title=f"{title}: {start:,.0f}" if parts else f"{title}: not tried")
    if parts:
        place = {"loc": "upper left", "bbox_to_anchor": (-0.04, -0.5), "columnspacing": 1.0, "handlelength": 1.0}
        axes.legend(frameon=False, ncols=3, fontsize=8, **place)
