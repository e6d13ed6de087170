"""Opening pictures of every kind, and turning them into the network's input and boxes back."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from minidet.images import ImageError, Preprocess, open_image, pad_batch
from minidet.kernels.resample import resample

H, W = 6, 9


def ramp() -> np.ndarray:
    """Grey levels that tell every pixel from its neighbours."""
    return np.arange(H * W, dtype=np.uint8).reshape(H, W) * 4


def save(folder, image: Image.Image, suffix: str = ".png", **options):
    path = folder / f"picture{suffix}"
    image.save(path, **options)
    return path


# --- opening ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(ramp().astype(np.uint16) << 8)
    else:
        image = Image.fromarray(ramp()).convert(mode)
    opened = open_image(save(tmp_path, image, ".tif" if mode in ("CMYK", "YCbCr", "PA") else ".png"))
    assert opened.shape == (H, W, 3)
    assert opened.dtype == np.uint8
    expected = np.where(ramp() >= 128, 255, 0) if mode == "1" else ramp()
    if mode != "1":  # dithered
        assert np.abs(opened.astype(int) - expected[:, :, None]).max() <= 2


def test_sixteen_bits_keep_their_upper_eight_instead_of_being_clipped(tmp_path):
    path = save(tmp_path, Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], np.uint16)))
    assert open_image(path)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_transparent_becomes_white(tmp_path):
    image = np.zeros((2, 3, 4), np.uint8)
    image[:, :, 3] = [0, 128, 255]
    assert open_image(save(tmp_path, Image.fromarray(image)))[0, :, 0].tolist() == [255, 127, 0]


def test_a_transparent_palette_entry_becomes_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    opened = open_image(save(tmp_path, image, transparency=0))
    assert opened[0].tolist() == [[255, 255, 255], [200, 100, 50]]


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("L", (4, 4), level) for level in (10, 200)]
    path = save(tmp_path, frames[0], ".gif", save_all=True, append_images=frames[1:])
    assert np.all(open_image(path) == 10)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    """The file stores the scene as the camera saw it; opened, all eight show the same scene."""
    stored = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.T, 6: lambda a: np.rot90(a), 7: lambda a: a[::-1, ::-1].T, 8: lambda a: np.rot90(a, -1),
    }[orientation](ramp())  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(open_image(path)[:, :, 0], ramp())
    np.testing.assert_array_equal(open_image(path, upright=False)[:, :, 0], stored)


def bomb(path):
    """A png of a few bytes that says it is 60,000 x 60,000."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(100))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def truncated(path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


BAD_FILES = {
    "missing": (".jpg", lambda path: None, "no such file"),
    "a folder": (".jpg", lambda path: path.mkdir(), "no such file"),
    "empty": (".jpg", lambda path: path.touch(), "not an image; readable are JPEG, PNG"),
    "text": (".jpg", lambda path: path.write_text("<html>404</html>"), "not an image"),
    "postscript": (".eps", lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n"), "not an image"),
    "truncated jpeg": (".jpg", truncated, "cannot be decoded .*truncated"),
    "truncated png": (".png", truncated, "cannot be decoded"),
    "bomb": (".png", bomb, "decompression bomb"),
    "floating point": (
        ".tif", lambda path: Image.fromarray(np.ones((2, 2), np.float32)).save(path), "floating-point grey levels"
    ),
    "32 bits": (
        ".tif", lambda path: Image.fromarray(np.full((2, 2), 70_000, np.int32)).save(path), "beyond 16 bits"
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(tmp_path, name):
    suffix, make, message = BAD_FILES[name]
    path = tmp_path / f"bad{suffix}"
    make(path)
    with pytest.raises(ImageError, match=rf"bad\{suffix}.*{message}"):
        open_image(path)


def test_a_large_image_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", H * W - 1)  # PIL itself only warns up to twice this
    with pytest.raises(ImageError, match="more than 53 pixels: a decompression bomb"):
        open_image(save(tmp_path, Image.fromarray(ramp())))


# --- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "min_size", "max_size", "old", "new"),
    [
        ("float", 800, 1333, (480, 640), (800, 1066)),
        ("float", 800, 1333, (97, 97), (799, 799)),  # 97 * (800 / 97) is 799.9999...
        ("float", 800, 1333, (682, 644), (847, 799)),
        ("float", 800, 1333, (300, 1000), (399, 1333)),  # the long side decides
        ("float", 100, 200, (1, 5000), (1, 200)),  # never 0 high
        ("pil", 800, 1333, (480, 640), (800, 1067)),
        ("pil", 800, 1333, (97, 97), (800, 800)),
        ("pil", 800, 1333, (1000, 300), (1333, 400)),
        ("pil", 100, 200, (5000, 1), (200, 1)),
        ("float", 0, 0, (33, 77), (33, 77)),
        ("pil", 0, 0, (33, 77), (33, 77)),
    ],
)
def test_the_new_size_by_each_rule(method, min_size, max_size, old, new):
    preprocess = Preprocess(min_size, max_size, method)
    assert preprocess.size(*old) == new
    assert preprocess.prepare(np.zeros((*old, 3), np.uint8)).shape == (*new, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "bicubic"}, 'choose "float" or "pil"'),
        ({"min_size": -1}, "0 <= min_size <= max_size"),
        ({"min_size": 800, "max_size": 600}, "got 800 and 600"),
        ({"pad_multiple": 0}, "pad_multiple must be at least 1"),
        ({"std": (1.0, 0.0, 1.0)}, "std and scale must be positive"),
        ({"scale": 0.0}, "std and scale must be positive"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**settings)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)]
)
def test_only_rgb_bytes_are_prepared(image):
    with pytest.raises(ValueError, match="expected a uint8 RGB image"):
        Preprocess().prepare(image)


@pytest.mark.parametrize(
    ("method", "size"), [("float", (48, 64)), ("pil", (48, 64))], ids=["float", "pil"]
)
def test_sizes_kept_are_still_limited(method, size):
    keep = Preprocess(min_size=0, max_size=64, method=method)
    assert keep.size(40, 64) == (40, 64)
    assert keep.size(96, 128) == size
    assert keep.size(1, 1000) == (1, 64)
    assert Preprocess(min_size=0, max_size=0, method=method).size(96, 128) == (96, 128)


# --- pixels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [(6, 9), (3, 5), (13, 10), (1, 1), (6, 20)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_fast_resampling_is_the_definition(rng, new, dtype):
    image = rng.integers(0, 256, (H, W, 3), dtype=np.uint8)
    levels = rng.normal(size=(256, 3)).astype(dtype)
    assert resample.choose(image, levels, *new)[0] == "numpy:fast"
    fast, textbook = resample(image, levels, *new), resample.textbook(image, levels, *new)
    assert fast.dtype == textbook.dtype == dtype
    np.testing.assert_allclose(fast, textbook, rtol=0, atol=1e-6 if dtype == np.float32 else 1e-14)


def test_resampling_by_hand():
    """Four pixels to two: each new centre lies in the middle of two old ones."""
    levels = np.arange(256.0)[:, None]
    assert resample(np.array([[[0], [10], [20], [40]]], np.uint8), levels, 1, 2).ravel().tolist() == [5, 30]
    # And two to four: centres at -1/4 (held to the edge), 1/4, 3/4, 5/4 (beyond the last: repeated).
    assert resample(np.array([[[0], [40]]], np.uint8), levels, 1, 4).ravel().tolist() == [0, 10, 30, 40]


def test_normalising_uses_the_channels_the_network_sees(rng):
    image = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    mean, std = (103.53, 116.28, 123.675), (1.0, 2.0, 4.0)
    prepared = Preprocess(0, 0, mean=mean, std=std, scale=1.0, bgr=True).prepare(image, np.float64)
    np.testing.assert_allclose(prepared, (image[:, :, ::-1] - np.array(mean)) / std, rtol=0, atol=1e-12)
    plain = Preprocess(0, 0).prepare(image)
    assert plain.dtype == np.float32
    expected = (image / 255 - np.array((0.485, 0.456, 0.406))) / np.array((0.229, 0.224, 0.225))
    np.testing.assert_allclose(plain, expected, rtol=0, atol=1e-6)


def test_pil_resizing_antialiases_and_float_does_not():
    """Single white columns, eight apart: one rule skips pixels, the other averages them."""
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, ::8] = 255
    settings = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    skipped = Preprocess(8, 8, "float", **settings).prepare(image)
    averaged = Preprocess(8, 8, "pil", **settings).prepare(image)
    assert skipped.max() == 0
    assert np.all(averaged.max(axis=1) > 0.1)


def test_a_flipped_view_is_prepared_like_its_copy(rng):
    image = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    preprocess = Preprocess(10, 20)
    view = image[:, ::-1].transpose(1, 0, 2)
    np.testing.assert_array_equal(preprocess.prepare(view), preprocess.prepare(view.copy()))


# --- boxes and batches -----------------------------------------------------------------------------------


def test_boxes_there_and_back():
    preprocess = Preprocess(100, 200)
    boxes = np.array([[0, 0, 60, 40], [10, 5, 30, 20]], np.float32)
    new = preprocess.size(40, 60)
    assert new == (100, 150)
    there = preprocess.boxes(boxes, (40, 60), new)
    assert there.dtype == np.float32
    np.testing.assert_allclose(there, [[0, 0, 150, 100], [25, 12.5, 75, 50]])
    np.testing.assert_allclose(preprocess.boxes_back(there, new, (40, 60)), boxes, rtol=1e-6)


def test_ratios_are_float32_whatever_the_boxes_are():
    moved = Preprocess().boxes(np.ones((1, 4)), (3, 3), (1, 1))
    assert moved.dtype == np.float64
    assert moved[0, 0] == float(np.float32(1) / np.float32(3)) != 1 / 3


def test_padding_is_zero_at_the_bottom_and_right():
    images = [np.ones((5, 9, 3), np.float32), np.ones((8, 4, 3), np.float32)]
    batch, sizes = pad_batch(images, 8)
    assert batch.shape == (2, 8, 16, 3)
    assert batch.dtype == np.float32
    assert sizes.tolist() == [[5, 9], [8, 4]]
    for padded, (h, w) in zip(batch, sizes, strict=True):
        assert np.all(padded[:h, :w] == 1)
        assert padded.sum() == h * w * 3


def test_padding_to_a_given_size():
    image = np.ones((5, 9, 3), np.float32)
    assert pad_batch([image], 8, (20, 9))[0].shape == (1, 24, 16, 3)
    with pytest.raises(ValueError, match="5 x 9 does not fit into 4 x 16"):
        pad_batch([image], 4, (4, 16))
