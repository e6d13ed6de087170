"""Images on their way to a GPU while it computes: through pinned memory, in a stream of their own, normalised there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from minidet import backend
from minidet.backend import Array
from minidet.images import Preprocess
from minidet.kernels import cuda


class Place:
    """Memory that batches pass through, one after the other: pinned on the host, and as much on the GPU.

    Two of them take turns: `send` fills one, in whatever thread, while the thread that computes works on what it got
    from the other's `receive`.  Neither waits for the GPU, unless a place is to be filled again before its last copy
    is done.

    Rule: in the copies' stream a copy comes after all reading of what it overwrites (`used`), and in the stream that
    computes all reading comes after the copy (`copied`).  The pinned memory is written to when the copy from it is
    done.  What `receive` gives is new memory of the stream that computes, so nobody else needs to know of this one.
    Source: CUDA Programming Guide, "Asynchronous Concurrent Execution": only copies from pinned memory overlap.
    """

    def __init__(self, stream, levels: Array) -> None:
        gpu = backend.cuda().cuda
        self.stream, self.levels, self.computes = stream, levels, gpu.get_current_stream()
        self.copied, self.used = gpu.Event(disable_timing=True), gpu.Event(disable_timing=True)
        self.pinned = np.empty(0)

    @staticmethod
    def two(xp, preprocess: Preprocess) -> tuple[Place, Place]:
        """Both, with one stream; `preprocess` says what bytes are normalised to."""
        stream, levels = backend.cuda().cuda.Stream(non_blocking=True), xp.asarray(preprocess.levels())
        return Place(stream, levels), Place(stream, levels)

    def send(self, images: np.ndarray) -> None:
        """Order the copy of a padded batch to the GPU; its memory may be used for other things at once.

        Shapes:
            images: (N, H, W, 3), bytes or normalised float32
        """
        self.copied.synchronize()
        if self.pinned.dtype != images.dtype or self.pinned.size < images.size:
            cupy, size = backend.cuda(), max(1, images.size)
            memory = cupy.cuda.alloc_pinned_memory(size * images.itemsize)
            self.pinned = np.frombuffer(memory, images.dtype, size)
            self.there = cupy.empty(size, dtype=images.dtype)
            self.used.record(self.computes)  # the pool gives memory whose last kernels may still be in that stream
        pinned, self.images = self.pinned[: images.size], self.there[: images.size].reshape(images.shape)
        pinned[...] = images.reshape(-1)
        self.stream.wait_event(self.used)
        self.there[: images.size].set(pinned, self.stream)
        self.copied.record(self.stream)

    def receive(self, sizes: np.ndarray) -> Array:
        """What was sent, normalised, on the GPU: what is ordered from now on comes after the copy.

        Shapes:
            sizes: (N, 2), of each image without padding
            returns: (N, H, W, 3), zeros where it is padded
        """
        self.computes.wait_event(self.copied)
        if self.images.dtype == np.uint8:
            xp = backend.namespace(self.levels)
            images, sizes = xp.empty(self.images.shape, dtype=self.levels.dtype), xp.asarray(sizes, dtype=xp.int64)
            arguments = self.images, sizes, self.levels, images, images.size, *images.shape[1:]
            cuda.launch(__file__, "normalise", images.size, *arguments, real=images.dtype)
        else:
            images = self.images.copy()
        self.used.record(self.computes)
        return images

    def leave(self) -> None:
        """Before the memory is given back: nobody gets it before the last copy to it is done."""
        self.computes.wait_event(self.copied)


class Parts:
    """A batch's images on a GPU, of which `images[cut]` makes a part: no more of them are there than are needed.

    `cuts` says the parts; `take` gives one after the other, and orders the copy of the next.  What is asked for out of
    turn, to find out what went wrong with a step, is copied by itself.
    """

    def __init__(
        self, images: np.ndarray, sizes: np.ndarray, cuts: list[slice], take: Callable[[], Array], place: Place
    ) -> None:
        self.shape, self._host, self._sizes = images.shape, images, sizes
        self._cuts, self._take, self._place = cuts, take, place

    def __len__(self) -> int:
        return len(self._host)

    def __getitem__(self, cut: slice) -> Array:
        if self._cuts and cut == self._cuts[0]:
            del self._cuts[0]
            images = self._take()
        else:
            place = Place(self._place.stream, self._place.levels)
            place.send(self._host[cut])
            images = place.receive(self._sizes[cut])
            place.copied.synchronize()  # its pinned memory goes
        return padded(images, *self.shape[1:3])

    def pad(self, H: int, W: int) -> None:
        """From now on, parts are padded to this size."""
        self.shape = (len(self), H, W, 3)


def padded(images: Array, H: int, W: int) -> Array:
    """Images with zeros below and to the right, up to height H and width W.

    Shapes:
        images: (N, h, w, C)
        returns: (N, H, W, C)
    """
    N, h, w, C = images.shape
    if (h, w) == (H, W):
        return images
    full = backend.namespace(images).zeros((N, H, W, C), dtype=images.dtype)
    full[:, :h, :w] = images
    return full
