// The kernels of implicit.cu on the emulator, for ctypes (emulated.py).

#include "implicit.cu"

#define BLOCK_OF_THREADS THREADS, STAGES * STAGE_BYTES
#include "emulated.h"

extern "C" {
int plan_words() { return sizeof(Plan) / 4; }

#define LAUNCHES(T, name)                                                                                          \
    LAUNCH(convolve_##name, (const T* x, const T* weight, const float* scale, const float* bias,                   \
                             const T* shortcut, T* y, const Plan* plan, int relu),                                 \
           (x, weight, scale, bias, shortcut, y, plan, relu))                                                      \
    LAUNCH(correlate_##name, (const T* x, const T* gy, float* shares, const Plan* plan, int share),                \
           (x, gy, shares, plan, share))

LAUNCHES(Bfloat16, bfloat16)
LAUNCHES(float, float32)
}
