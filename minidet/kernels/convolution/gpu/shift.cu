// The two ends of a convolution by shifts (shift.py): a map gets its rim of zeros, and sums become a result.
//
// A level is laid out with one column of zeros after every row, one row of zeros after every image, and zeros before
// and after it all.  A thread moves four channels.

struct Bfloat16 { unsigned short bits; };  // the upper half of a float

template <class T> struct alignas(4 * sizeof(T)) Four { T at[4]; };

#ifdef __CUDACC__
__device__ __forceinline__ void narrow(float value, float& to) { to = value; }
__device__ __forceinline__ void narrow(float value, Bfloat16& to) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
}
__device__ __forceinline__ float widen(float number) { return number; }
__device__ __forceinline__ float widen(Bfloat16 number) { return __uint_as_float(number.bits << 16); }
#else
#include "cuda_emulator.h"
#endif

// Where a level lies in (N, S, C), and how many rows of zeros are before and after it in the layout with a rim.
struct Place { int images, height, width, channels, pixels, start, before, rows; };

// rim[before + (n * (height + 1) + h) * (width + 1) + w] = x[n, start + h * width + w], and 0 elsewhere.
template <class T>
__device__ __forceinline__ void spread(const T* x, T* rim, Place at) {
    const int quarter = at.channels / 4;
    const long long id = blockIdx.x * 256LL + threadIdx.x;
    if (id >= static_cast<long long>(at.rows) * quarter) return;
    const int piece = id % quarter, cell = static_cast<int>(id / quarter) - at.before;
    const int w = cell % (at.width + 1), line = cell / (at.width + 1);
    const int h = line % (at.height + 1), n = line / (at.height + 1);
    Four<T> four{};
    if (cell >= 0 && w < at.width && h < at.height && n < at.images) {
        const long long pixel = static_cast<long long>(n) * at.pixels + at.start + h * at.width + w;
        four = reinterpret_cast<const Four<T>*>(x)[pixel * quarter + piece];
    }
    reinterpret_cast<Four<T>*>(rim)[id] = four;
}

// y[n, start + h * width + w] = act(scale * sums[(n * (height + 1) + h) * (width + 1) + w] + bias + shortcut).
template <class T>
__device__ __forceinline__ void collect(const float* sums, const float* scale, const float* bias, const T* shortcut,
                                        T* y, Place at, int relu) {
    const int quarter = at.channels / 4;
    const long long id = blockIdx.x * 256LL + threadIdx.x;
    if (id >= static_cast<long long>(at.images) * at.height * at.width * quarter) return;
    const int piece = id % quarter, cell = static_cast<int>(id / quarter);
    const int w = cell % at.width, h = cell / at.width % at.height, n = cell / at.width / at.height;
    const long long row = (static_cast<long long>(n) * (at.height + 1) + h) * (at.width + 1) + w;
    const Four<float> four = reinterpret_cast<const Four<float>*>(sums)[row * quarter + piece];
    const long long pixel = static_cast<long long>(n) * at.pixels + at.start + h * at.width + w;
    Four<T> result, added{};
    if (shortcut) added = reinterpret_cast<const Four<T>*>(shortcut)[pixel * quarter + piece];
    for (int i = 0; i < 4; ++i) {
        float value = four.at[i];
        if (scale) value *= scale[piece * 4 + i];
        if (bias) value += bias[piece * 4 + i];
        if (shortcut) value += widen(added.at[i]);
        narrow(relu && value < 0 ? 0 : value, result.at[i]);  // a NaN stays one
    }
    reinterpret_cast<Four<T>*>(y)[pixel * quarter + piece] = result;
}

#define KERNELS(T, name)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) spread_##name(const T* x, T* rim, const Place* at) {           \
        spread<T>(x, rim, *at); }                                                                                    \
    extern "C" __global__ void __launch_bounds__(256) collect_##name(                                                \
        const float* sums, const float* scale, const float* bias, const T* shortcut, T* y, const Place* at,          \
        int relu) { collect<T>(sums, scale, bias, shortcut, y, *at, relu); }

KERNELS(Bfloat16, bfloat16)
KERNELS(float, float32)
