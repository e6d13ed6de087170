// The kernels of shift.cu on the emulator, for ctypes (emulated.py).

#include "shift.cu"

#define BLOCK_OF_THREADS 256, 0
#include "emulated.h"

extern "C" {
#define LAUNCHES(T, name)                                                                                          \
    LAUNCH(spread_##name, (const T* x, T* rim, const Place* at), (x, rim, at))                                     \
    LAUNCH(collect_##name, (const float* sums, const float* scale, const float* bias, const T* shortcut, T* y,     \
                            const Place* at, int relu), (sums, scale, bias, shortcut, y, at, relu))

LAUNCHES(Bfloat16, bfloat16)
LAUNCHES(float, float32)
}
