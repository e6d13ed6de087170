"""Images on their way to a GPU while it computes: through pinned memory, in a stream of their own, normalised there."""

from __future__ import annotations

import numpy as np

from minidet import backend
from minidet.backend import Array
from minidet.images import Preprocess
from minidet.kernels.resample import resample


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
        cuda = backend.cuda().cuda
        self.stream, self.levels, self.computes = stream, levels, cuda.get_current_stream()
        self.copied, self.used = cuda.Event(disable_timing=True), cuda.Event(disable_timing=True)
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
            images = backend.namespace(self.levels).zeros(self.images.shape, dtype=self.levels.dtype)
            for n, (h, w) in enumerate(sizes.tolist()):
                images[n, :h, :w] = resample(self.images[n, :h, :w], self.levels, h, w)
        else:
            images = self.images.copy()
        self.used.record(self.computes)
        return images

    def leave(self) -> None:
        """Before the memory is given back: nobody gets it before the last copy to it is done."""
        self.computes.wait_event(self.copied)
