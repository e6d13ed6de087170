// As much of CUDA as kernels without shared memory need, on one thread of a CPU: the grid is two loops.
#include <cmath>
#include <cstdint>
#include <cstring>
#include "flushing.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__

struct Index { unsigned x; };
static Index blockIdx, threadIdx, blockDim, gridDim;

#define GRID(call)                                                                   \
    Flushing flushing;                                                                  \
    gridDim.x = grid_size; blockDim.x = block_size;                                     \
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)                       \
        for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) call;

template <class T> T atomicAdd(T *at, T value) { T old = *at; *at = old + value; return old; }
template <class T> T atomicMax(T *at, T value) { T old = *at; if (value > old) *at = value; return old; }

inline int __float_as_int(float x) { int i; std::memcpy(&i, &x, sizeof i); return i; }
inline float __int_as_float(int i) { float x; std::memcpy(&x, &i, sizeof x); return x; }
inline long long __double_as_longlong(double x) { long long i; std::memcpy(&i, &x, sizeof i); return i; }
using std::exp;
using std::fabs;
using std::isnan;
using std::log1p;
using std::sqrt;
