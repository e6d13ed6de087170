"""Pictures: what is drawn where, in which colour, and that nothing needs a display."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from minidet import plots
from minidet.plots import curves

GREY = np.full((480, 640, 3), 128, np.uint8)
BOX = np.array([[100, 100, 300, 260]], np.float32)
NAMES = ("cat", "dog")


def rgb(colour):
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def shows(picture, colour):
    return bool(np.any(np.all(picture == rgb(colour), axis=-1)))


def drawn(image=GREY, boxes=BOX, labels=(1,), scores=(0.9,), **options):
    return plots.draw_boxes(image, boxes, np.array(labels, int), scores, NAMES, **options)


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_a_box_is_outlined_where_it_is():
    picture = drawn(scores=None)
    assert picture.shape == GREY.shape and picture.dtype == np.uint8
    for y, x in [(260, 200), (180, 100), (180, 300)]:  # bottom, left, right
        assert picture[y, x].tolist() == rgb(plots.colour_of(1))
    assert picture[180, 200].tolist() == [128, 128, 128]
    assert np.all(GREY == 128), "the image given is left alone"


def test_each_label_has_its_colour():
    boxes = np.concatenate([BOX, BOX + 40])
    picture = drawn(boxes=boxes, labels=(0, 1), scores=(0.9, 0.8))
    assert shows(picture, plots.colour_of(0)) and shows(picture, plots.colour_of(1))


def test_colours_are_distinct_for_all_of_coco():
    colours = np.array([rgb(plots.colour_of(k)) for k in range(80)])
    assert len(np.unique(colours, axis=0)) == 80
    apart = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 1e9 * np.eye(80)
    assert apart[:8, :8].min() > 75 and apart.min() > 8


def test_the_best_box_lies_on_top():
    twice = np.concatenate([BOX, BOX])
    for scores, top in [((0.9, 0.2), 0), ((0.2, 0.9), 1)]:
        picture = drawn(boxes=twice, labels=(0, 1), scores=scores)
        assert picture[260, 200].tolist() == rgb(plots.colour_of(top))


def test_labels_of_equal_boxes_do_not_hide_each_other():
    five = np.repeat(BOX, 5, axis=0)
    picture = drawn(boxes=five, labels=[0] * 5, scores=[0.9, 0.8, 0.7, 0.6, 0.5])
    one = drawn(labels=[0])
    # Four more labels outside or inside the box, hardly overlapping.
    filled = [np.all(p == rgb(plots.colour_of(0)), axis=-1).sum() for p in (one, picture)]
    assert filled[1] > 2.5 * filled[0] - 1500


@pytest.mark.parametrize(
    "box", [(-50, -50, 700, 500), (600, 440, 639, 479), (630, -5, 900, 3), (50, 60, 50, 60)]
)
def test_boxes_at_and_over_the_edge_are_seen(box):
    picture = drawn(boxes=np.array([box], np.float32))
    assert shows(picture, plots.colour_of(1))


def test_truth_is_dashed_in_white():
    picture = drawn(np.zeros_like(GREY), boxes=np.empty((0, 4)), labels=(), scores=(), truth=BOX)
    white = np.all(picture[100, 100:300] == 255, axis=-1)
    assert 0.3 < white.mean() < 0.7 and not np.any(np.all(picture[150:200, 150:250] == 255, axis=-1))


def test_nothing_to_draw_is_the_image_itself():
    for scores in (None, np.empty(0)):
        picture = drawn(boxes=np.empty((0, 4), np.float32), labels=(), scores=scores)
        np.testing.assert_array_equal(picture, GREY)


def test_small_images_are_enlarged_and_size_is_obeyed():
    small = np.zeros((96, 128, 3), np.uint8)
    box = np.array([[32, 32, 64, 64]], np.float32)
    picture = drawn(small, box)
    assert picture.shape == (288, 384, 3)
    assert picture[192, 150].tolist() == rgb(plots.colour_of(1))
    assert drawn(GREY, size=320).shape == (240, 320, 3)
    assert drawn(np.zeros((1, 4000, 3), np.uint8), size=480).shape == (1, 480, 3)


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ((0, 1), None, "got 1 boxes, 2 labels and 2 scores"),
        ((0,), (0.5, 0.5), "got 1 boxes, 1 labels and 2 scores"),
        ((2,), None, "label 2 has no name among 2 classes"),
        ((-1,), None, "label -1 has no name"),
    ],
)
def test_boxes_labels_and_scores_must_agree(labels, scores, message):
    with pytest.raises(ValueError, match=f"draw_boxes: {message}"):
        drawn(labels=labels, scores=scores)


def test_save_image_makes_folders_and_keeps_pixels(tmp_path, rng):
    image = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = plots.save_image(image, tmp_path / "deep" / "er" / "image.png")
    np.testing.assert_array_equal(read(path), image)


def test_contact_sheet_shows_every_image(tmp_path):
    images = [np.full((40 + 10 * k, 200, 3), 40 * k, np.uint8) for k in range(5)]
    titles = ["plain", "a title that is far too long for a column of two hundred pixels", "", "x", "γ = 2"]
    sheet = read(plots.contact_sheet(images, titles, tmp_path / "sheet.png", columns=3))
    for k, image in enumerate(images):
        assert np.all(sheet == 40 * k, axis=-1).sum() >= image.shape[0] * image.shape[1], k
    assert 3 * 200 < sheet.shape[1] < 3 * 230
    captioned = read(plots.contact_sheet(images, titles, tmp_path / "sheet.png", columns=3, caption="five shades"))
    assert captioned.shape[1] == sheet.shape[1] and captioned.shape[0] > sheet.shape[0]
    assert captioned[sheet.shape[0] - 5 :].min() < 128


@pytest.mark.parametrize(("images", "titles"), [([], []), ([GREY], []), ([GREY], ["a", "b"])])
def test_contact_sheet_needs_a_title_for_each_image(tmp_path, images, titles):
    with pytest.raises(ValueError, match=f"{len(images)} images and {len(titles)} titles"):
        plots.contact_sheet(images, titles, tmp_path / "sheet.png")


@pytest.mark.parametrize("steps", [1, 2, 7, 300])
def test_loss_curves(tmp_path, steps):
    position = np.arange(1, steps + 1) * 8
    losses = {name: (1 / position).tolist() for name in ("loss", "classification", "box")}
    plain = read(plots.loss_curves({"position": position, **losses}, tmp_path / "loss.png"))
    measured = {"AP": [None] * (steps - 1) + [0.3], "AP50": [0.5] * steps, "AP75": [None] * steps, "lr": losses["box"]}
    both = read(plots.loss_curves({"position": position, **losses, **measured}, tmp_path / "both.png"))
    assert shows(plain, plots.COLOURS[0]) and both.shape[0] > plain.shape[0]


def test_loss_curves_of_a_run_that_has_not_begun(tmp_path):
    empty = {name: [] for name in ("position", "loss", "classification", "box", "AP")}
    assert plots.loss_curves(empty, tmp_path / "loss.png").is_file()


def test_smoothing_keeps_a_constant_and_lessens_noise(rng):
    np.testing.assert_allclose(curves._smoothed(np.full(57, 3.0)), 3.0)
    noise = rng.normal(size=400)
    assert curves._smoothed(noise).std() < 0.4 * noise.std()


@pytest.mark.parametrize("classes", [0, 1, 8, 40])
def test_precision_recall(tmp_path, classes):
    recalls = np.linspace(0, 1, 101)
    curves = {f"class {k}": (recalls, np.clip(1 - recalls * k / 8, 0, 1)) for k in range(classes)}
    picture = read(plots.precision_recall(curves, tmp_path / "pr.png"))
    inked = np.all(picture == rgb(plots.INK), axis=-1).sum()  # the mean, where there is one
    assert (inked > 300) == (classes > 0)


def test_lines(tmp_path):
    xs = np.linspace(0.01, 1, 50)
    path = plots.lines({"γ = 0": (xs, -np.log(xs) + 1)}, tmp_path / "lines.png", x="p", y="loss", log="xy")
    assert shows(read(path), plots.COLOURS[0])


def test_bars(tmp_path):
    values = {"slow": 1.0, "fast": 40.0}
    plain = read(plots.bars(values, tmp_path / "bars.png", x="speed", title="Two ways"))
    blue = np.all(plain == rgb(plots.COLOURS[0]), axis=-1).sum(axis=1)
    rows = np.flatnonzero(blue)
    assert blue[rows[0]] * 20 < blue[rows[-1]]      # in order from the top, as long as the numbers say
    limited = read(plots.bars(values, tmp_path / "limited.png", limit=("the most there is", 60)))
    assert np.all(limited == rgb(plots.INK), axis=-1).sum() > np.all(plain == rgb(plots.INK), axis=-1).sum() + 100


def test_no_display_and_no_pyplot(tmp_path):
    program = (
        "import sys, numpy as np; from minidet import plots\n"
        "assert 'matplotlib' not in sys.modules, 'imported before it is needed'\n"
        "image = np.zeros((64, 64, 3), np.uint8)\n"
        "plots.contact_sheet([image], ['t'], sys.argv[1] + '/sheet.png')\n"
        "plots.lines({'a': (np.arange(3), np.arange(3))}, sys.argv[1] + '/lines.png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {"PATH": "", "MPLCONFIGDIR": str(tmp_path)}  # no DISPLAY, and no MPLBACKEND either
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=environment, timeout=120)
