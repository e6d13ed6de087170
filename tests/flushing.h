// CuPy compiles with -ftz=true: float32 numbers below the smallest normal one are read, compared and written as zeros.
// A CPU does the same to those of its instructions, and to float64's, while one of these is there.
#pragma once

#include <xmmintrin.h>

struct Flushing {
    unsigned before = _mm_getcsr();
    Flushing() { _mm_setcsr(before | 0x8040); }  // denormals are zeros, and results are flushed to zero
    ~Flushing() { _mm_setcsr(before); }
};
