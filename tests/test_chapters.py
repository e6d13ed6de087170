"""Chapters: each runs, keeps its promises (they assert them), and has the form that all share."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from source import ROOT, refuse, shown

CHAPTERS = sorted((ROOT / "chapters").glob("*.py"))
ROWS = ["Needs", "Reads", "Source", "Time"]
LONG = 15  # seconds; a chapter that takes longer trains, and is tried with
FEW_IMAGES = 480
TRAINING = ("04", "07")  # chapters that train, marked slow
MOST_LINES = 250

each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
each_to_run = pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem[:2] in TRAINING else ())
        for path in CHAPTERS
    ],
)


def cells(text: str) -> list[tuple[str, str]]:
    """("markdown" or "code", text) of every cell, comment signs taken off the markdown."""
    found = []
    for cell in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        head, _, body = cell.partition("\n")
        if head.strip() == "[markdown]":
            found.append(("markdown", re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE)))
        else:
            found.append(("code", body.strip()))
    return found


def card(text: str) -> dict[str, str]:
    """The table of the first cell."""
    return dict(re.findall(r"^\| (\w+) \| (.+) \|$", cells(text)[0][1], flags=re.MULTILINE))


def seconds(text: str) -> int:
    """How long the card says the chapter takes, at first."""
    number, unit = re.search(r"(\d+) (s|minutes?)\b", card(text)["Time"]).groups()
    return int(number) * (1 if unit == "s" else 60)


def faults(number: int, text: str) -> list[str]:
    """What is not as in every other chapter."""
    if not text.startswith("# %% [markdown]\n"):
        return ["does not open with a markdown cell"]
    (_, opening), (_, second) = cells(text)[:2]
    kind, closing = cells(text)[-1]
    found = []
    if not re.match(rf"# {number} · \S", opening):
        found.append(f"the title is not '# {number} · ...'")
    if "?" not in opening or "**You will see**" not in opening:
        found.append("the opening asks no question, or does not say what there is to see")
    if list(card(text)) != ROWS:
        found.append(f"the card has the rows {list(card(text))}, not {ROWS}")
    else:
        named = re.findall(r"`([\w/]+\.py)`", card(text)["Reads"])
        found += [f"Reads: {name} does not exist" for name in named if not (ROOT / name).is_file()]
        found += [] if named else ["Reads names no file"]
        found += [] if re.search(r"\d (s|minutes?)\b", card(text)["Time"]) else ["Time gives no time"]
    if f'out = Path(os.environ.get("MINIDET_CHAPTER_OUT", "runs/chapters")) / "{number:02d}"\n' not in second + "\n":
        found.append("pictures do not go where MINIDET_CHAPTER_OUT says")
    three = re.search(r"## Three things to remember\n\n1\. .*\n2\. .*\n3\. ", closing, re.DOTALL)
    if kind != "markdown" or not three:
        found.append("does not end with three things to remember")
    elif "**Next**: " not in closing:
        found.append("does not say what is next")
    if text.count("\n") > MOST_LINES:
        found.append(f"has {text.count(chr(10))} lines, at most {MOST_LINES}")
    for kind, cell in cells(text):
        if kind == "code" and re.search(r"\.show\(|input\(", cell):
            found.append("opens a window or asks for input")
    return found


def test_the_chapters_are_numbered_without_gaps():
    assert [int(path.stem.split("_")[0]) for path in CHAPTERS] == list(range(1, len(CHAPTERS) + 1))


@each_chapter
def test_the_form(path):
    refuse([f"{shown(path)}: {fault}" for fault in faults(int(path.stem[:2]), path.read_text())])


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("# # 1 · ", "# # 2 · ", "the title"),
        ("# %% [markdown]\n# # 1", "# # 1", "does not open"),
        ("| Source |", "| Paper |", "the card"),
        ("minidet/autograd.py", "minidet/gone.py", "Reads: minidet/gone.py does not exist"),
        ("MINIDET_CHAPTER_OUT", "ELSEWHERE", "pictures"),
        ("# 3. ", "# Also ", "three things"),
        ("**Next**: ", "Later, ", "what is next"),
    ],
)
def test_the_form_is_looked_at(old, new, fault):
    text = CHAPTERS[0].read_text()
    assert faults(1, text) == [] and old in text
    assert any(fault in found for found in faults(1, text.replace(old, new)))


@each_to_run
def test_it_runs(path, tmp_path):
    """As a reader runs it, warnings being errors; the pictures show something."""
    environment = os.environ | {"MINIDET_CHAPTER_OUT": str(tmp_path)}
    if seconds(path.read_text()) > LONG:
        environment["MINIDET_CHAPTER_IMAGES"] = str(FEW_IMAGES)
    program = [sys.executable, "-W", "error", str(path)]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert all(line.isprintable() for line in done.stdout.splitlines())
    # Photos that a chapter made for itself to train on are not what it shows.
    pictures = sorted(p for p in tmp_path.rglob("*.png") if "images" not in p.parts)
    assert pictures and {picture.relative_to(tmp_path).parts[0] for picture in pictures} == {path.stem[:2]}
    refuse([f"{picture.name} is blank" for picture in pictures if is_blank(picture)])


def is_blank(path: Path) -> bool:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    return min(pixels.shape[:2]) < 200 or len(np.unique(pixels.reshape(-1, 3), axis=0)) < 20
