"""From a picture file to the network's input and back: open, resize, normalise, pad; arrays only.

Training and detection share this file, and a checkpoint stores the `Preprocess` it was trained with: the two
can then never disagree about what a pixel means.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from minidet.kernels.resample import resample

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""RGB in 0..1; what torchvision's pretrained weights were trained with."""
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
"""What is opened: not all that PIL can, which includes starting other programs."""


class ImageError(ValueError):
    """A file that cannot be used as an image; the message names it."""


def open_image(path: str | Path, *, upright: bool = True) -> np.ndarray:
    """The picture in a file as RGB, turned upright as its EXIF orientation says.

    Grey, palette, CMYK and other modes become RGB; what is transparent becomes white; of 16 bits the upper 8
    are kept; of several frames the first.

    Shapes:
        returns: (H, W, 3)
    Units: uint8.
    Raises:
        ImageError: if there is no such file, or it is broken, no image, or larger than PIL's limit against
            decompression bombs.
    """
    if not Path(path).is_file():
        raise ImageError(f"{path}: no such file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(_to_rgb(image))
    except UnidentifiedImageError:
        raise ImageError(f"{path}: not an image; readable are {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(
            f"{path}: more than {Image.MAX_IMAGE_PIXELS} pixels: a decompression bomb? If the file can be "
            "trusted, raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    except Exception as error:  # decoders raise whatever their parsers do: struct.error, SyntaxError, OSError ...
        raise ImageError(f"{path}: cannot be decoded ({type(error).__name__}: {error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, in one of several byte orders; PIL's own conversion clips them
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() >= 2**16:
            raise ValueError("grey levels beyond 16 bits; convert it to 8 bits")
        image = Image.fromarray((levels >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point grey levels, of unknown range; convert it to 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the network's input.

    Source: `method` "float" is torchvision's GeneralizedRCNNTransform, "pil" detectron2's ResizeShortestEdge.
    """

    min_size: int = 800
    """Pixels the shorter side becomes; 0 leaves every image its size, as far as max_size allows."""
    max_size: int = 1333
    """Limit for the longer side, in pixels; it wins over min_size.  0, with min_size 0: no limit."""
    method: str = "float"
    """"float": bilinear on numbers, without antialiasing; "pil": on bytes, with antialiasing."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    """(pixel * scale - mean) / std, in the channel order the network sees."""
    scale: float = 1 / 255
    bgr: bool = False
    """Channels reversed, as networks trained with Caffe or OpenCV expect."""
    pad_multiple: int = 32
    """Batches are padded at the bottom and right to a multiple of this many pixels."""

    def __post_init__(self) -> None:
        if self.method not in ("float", "pil"):
            raise ValueError(f'Preprocess.method is {self.method!r}: choose "float" or "pil"')
        if self.min_size < 0 or (self.min_size and self.max_size < self.min_size):
            raise ValueError(
                f"Preprocess: need 0 <= min_size <= max_size, got {self.min_size} and {self.max_size}"
            )
        if self.pad_multiple < 1:
            raise ValueError(f"Preprocess.pad_multiple must be at least 1, got {self.pad_multiple}")
        if min(self.std) <= 0 or self.scale <= 0:
            raise ValueError(f"Preprocess: std and scale must be positive, got {self.std} and {self.scale}")

    def size(self, h: int, w: int) -> tuple[int, int]:
        """The size an h x w image is given.

        Rule: "float" rounds down, even 799.9999 (97 x 97 becomes 799 x 799 at 800); "pil" rounds half up.
        """
        if self.min_size == 0 and (self.max_size == 0 or max(h, w) <= self.max_size):
            return h, w
        short = self.min_size or min(h, w)
        if self.method == "float":
            scale = min(short / min(h, w), self.max_size / max(h, w))
            new_h, new_w = h * scale, w * scale
        else:
            scale = short / min(h, w)
            new_h, new_w = (short, scale * w) if h < w else (scale * h, short)
            shrink = min(1, self.max_size / max(new_h, new_w))
            new_h, new_w = new_h * shrink + 0.5, new_w * shrink + 0.5
        return max(1, int(new_h)), max(1, int(new_w))  # a line of pixels stays one

    def prepare(self, image: np.ndarray, dtype=np.float32) -> np.ndarray:
        """One image, resized and normalised, not padded.

        Shapes:
            image: (H, W, 3)
            returns: (h, w, 3) with h, w = self.size(H, W)
        """
        return self.normalise(self.pixels(image), dtype)

    def normalise(self, pixels: np.ndarray, dtype=np.float32) -> np.ndarray:
        """What `pixels` gives, as numbers, and resized where bytes could not be.

        Shapes:
            pixels: (H, W, 3)
            returns: (h, w, 3)
        """
        size = pixels.shape[:2] if self.keeps_bytes else self.size(*pixels.shape[:2])
        return resample(pixels, self.levels(dtype), *size)

    @property
    def keeps_bytes(self) -> bool:
        """Whether resizing gives bytes: they may then be normalised later and elsewhere, a quarter as large until then.

        PIL rounds to bytes; the "float" method gives numbers between them, unless it leaves every image its size.
        """
        return self.method == "pil" or self.min_size == self.max_size == 0

    def pixels(self, image: np.ndarray) -> np.ndarray:
        """One image in the channel order the network sees, and where `keeps_bytes`, resized.

        Shapes:
            image: (H, W, 3)
            returns: (h, w, 3) with h, w = self.size(H, W), or (H, W, 3)
        Units: uint8.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"expected a uint8 RGB image (H, W, 3), got {image.dtype} {image.shape}")
        size = self.size(*image.shape[:2])
        if self.bgr:
            image = image[:, :, ::-1]
        if self.method == "pil" and size != image.shape[:2]:
            pil = Image.fromarray(np.ascontiguousarray(image))
            image = np.asarray(pil.resize(size[::-1], Image.Resampling.BILINEAR))
        return image

    def levels(self, dtype=np.float32) -> np.ndarray:
        """What each of the 256 bytes is normalised to, in each channel.

        Shapes:
            returns: (256, 3)
        """
        return _levels(self.scale, tuple(self.mean), tuple(self.std), dtype)

    def boxes(self, boxes: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
        """Boxes of an image of size `old` (h, w), after it was resized to `new`.

        Shapes:
            boxes: (G, 4)
            returns: (G, 4)
        Rule: one ratio an axis, of the whole-numbered sizes, in float32 whatever the boxes are; where nothing was
            resized, these boxes and no copy.
        """
        if old == new:
            return boxes
        x, y = (np.float32(new[axis]) / np.float32(old[axis]) for axis in (1, 0))
        return boxes * np.array([x, y, x, y], np.float32)

    def boxes_back(self, boxes: np.ndarray, new: tuple[int, int], old: tuple[int, int]) -> np.ndarray:
        """Boxes found in the resized image, in pixels of the original: `boxes` with the sizes swapped."""
        return self.boxes(boxes, new, old)


@lru_cache(maxsize=8)
def _levels(scale, mean, std, dtype):
    # Pixels in 0..1 are float32 even where the rest is float64, as the reference systems decode them.
    pixels = np.arange(256, dtype=np.float32) / np.float32(1 / scale)
    levels = (pixels.astype(dtype)[:, None] - np.array(mean, dtype)) / np.array(std, dtype)
    levels.setflags(write=False)  # everybody gets this one array
    return levels


def pad_batch(
    images: list[np.ndarray], multiple: int, size: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Images of different sizes as one array, zeros at the bottom and right; and their sizes.

    Shapes:
        returns: (N, H, W, 3) and (N, 2)
    Rule: H and W are the largest of the images, or `size`, rounded up to a multiple of `multiple`.
    Raises:
        ValueError: if an image is larger than `size`.
    """
    sizes = np.array([image.shape[:2] for image in images], np.int64)
    largest = sizes.max(axis=0)
    if size is not None and np.any(largest > size):
        raise ValueError(f"an image of {largest[0]} x {largest[1]} does not fit into {size[0]} x {size[1]}")
    H, W = (-(-int(side) // multiple) * multiple for side in size or largest)
    make = np.empty if np.all(sizes == (H, W)) else np.zeros
    batch = make((len(images), H, W, images[0].shape[2]), images[0].dtype)
    for padded, image in zip(batch, images, strict=True):
        padded[: image.shape[0], : image.shape[1]] = image
    return batch, sizes
