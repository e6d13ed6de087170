// The rectifier, and sums over rows: pointwise.py has the definitions.

extern "C" __global__ void rectify(const REAL *x, REAL *y, long long size)
{
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) y[i] = x[i] < 0 ? (REAL)0 : x[i];
}

extern "C" __global__ void rectify_sum(const REAL *a, const REAL *b, REAL *y, long long size)
{
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    Wide total = a[i] + b[i];
    y[i] = total < 0 ? (Wide)0 : total;
}

extern "C" __global__ void rectify_gradient(const REAL *gy, const REAL *y, REAL *gx, long long size)
{
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) gx[i] = y[i] > 0 ? gy[i] : (REAL)0;
}

// A thread adds up every `chunks`-th row of one column: neighbouring threads read neighbouring numbers.

extern "C" __global__ void column_sums(const REAL *g, Wide *sums, long long rows, long long columns, long long chunks)
{
    long long t = (long long)blockIdx.x * blockDim.x + threadIdx.x, f = t % columns;
    if (t >= chunks * columns) return;
    Wide total = 0;
    for (long long r = t / columns; r < rows; r += chunks) total += g[r * columns + f];
    sums[t] = total;
}

extern "C" __global__ void epilogue_gradient(const REAL *gy, const REAL *y, const Wide *scale, REAL *gs, Wide *sums,
    long long rows, long long columns, long long chunks)
{
    long long t = (long long)blockIdx.x * blockDim.x + threadIdx.x, f = t % columns;
    if (t >= chunks * columns) return;
    Wide total = 0, factor = scale[f];
    for (long long r = t / columns; r < rows; r += chunks) {
        long long i = r * columns + f;
        Wide g = y[i] > 0 ? gy[i] : (REAL)0;
        gs[i] = g * factor;
        total += g;
    }
    sums[t] = total;
}
