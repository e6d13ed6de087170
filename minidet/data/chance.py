"""Random numbers inside compiled code: NumPy's generator SFC64, number for number.

A call of NumPy's generator takes as long as a hundred numbers take here, and Numba compiles for seconds to call it.
"""

from __future__ import annotations

import numpy as np

from minidet.kernels.compiler import compiled

WHOLE, HALF = 2**64 - 1, 2**32 - 1
ONE = np.uint64(1)


def seeded(*numbers: int) -> np.ndarray:
    """The state that `SFC64(numbers)` begins with: four words, whether half a word is left over, and that half.

    Shapes:
        returns: (6,)
    Units: numbers below 2**32.
    """
    state = np.zeros(6, np.uint64)
    state[:3] = np.random.SeedSequence(np.array(numbers, np.uint32)).generate_state(3, np.uint64)
    state[3] = ONE
    words(state, 12)
    return state


@compiled(nogil=True)
def words(state: np.ndarray, count: int) -> np.ndarray:
    """Random bits, 64 to a word: `random_raw(count)`."""
    drawn = np.empty(count, np.uint64)
    a, b, c, counter = int(state[0]), int(state[1]), int(state[2]), int(state[3])
    for i in range(count):
        drawn[i], a, b, c, counter = _step(a, b, c, counter)
    state[0], state[1], state[2], state[3] = a, b, c, counter
    return drawn


@compiled(nogil=True)
def _word(state):
    word, a, b, c, counter = _step(int(state[0]), int(state[1]), int(state[2]), int(state[3]))
    state[0], state[1], state[2], state[3] = a, b, c, counter
    return word


@compiled(nogil=True)
def _step(a, b, c, counter):
    word = (a + b + counter) & WHOLE
    a, b, c = b ^ b >> 11, c + (c << 3) & WHOLE, ((c << 24 | c >> 40) + word) & WHOLE
    return word, a, b, c, int(counter + ONE)


@compiled(nogil=True)
def uniform(state: np.ndarray, low: float, high: float) -> float:
    """A number from low to below high: `uniform(low, high)`."""
    return low + (high - low) * ((int(_word(state)) >> 11) * 2.0**-53)


@compiled(nogil=True)
def integer(state: np.ndarray, limits: tuple[int, int]) -> int:
    """A whole number from low to below high, which is between 2 and 2**31 more: `integers(low, high)`.

    Source: D. Lemire, Fast Random Integer Generation in an Interval, 2019.
    """
    low, high = limits
    while True:
        if state[4]:
            half = int(state[5])
        else:
            both = int(_word(state))
            half, state[5] = both & HALF, both >> 32
        state[4] = ONE - state[4]
        product = np.int64(half) * (high - low)
        # Were none refused, some numbers would be a little more likely than others.
        if product & HALF >= (HALF + 1) % (high - low):
            return low + (product >> 32)
