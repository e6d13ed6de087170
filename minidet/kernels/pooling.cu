// Max pooling and its gradient: pooling.py has the definitions.

extern "C" __global__ void max_pool(const REAL *x, REAL *best, unsigned char *winners, long long count, long long H,
    long long W, long long P, long long Q, long long C, long long size, long long stride, long long padding)
{
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    long long c = i % C, q = i / C % Q, p = i / C / Q % P, n = i / C / Q / P;
    Wide high = 0;
    int who = 0;
    for (int tap = 0; tap < size * size; ++tap) {
        long long h = p * stride + tap / size - padding, w = q * stride + tap % size - padding;
        Wide value = __int_as_float(0xff800000);  // minus infinity
        if (h >= 0 && h < H && w >= 0 && w < W) value = x[((n * H + h) * W + w) * C + c];
        if (tap == 0 || value > high || (isnan(value) && !isnan(high))) { high = value; who = tap; }
    }
    best[i] = high;
    winners[i] = who;
}

// A pixel asks every window that reads it whether it won there: nobody else writes to it, and the order is fixed.
extern "C" __global__ void max_pool_gradient(const REAL *gy, const unsigned char *winners, REAL *gx, long long count,
    long long H, long long W, long long P, long long Q, long long C, long long size, long long stride, long long padding)
{
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    long long c = i % C, w = i / C % W, h = i / C / W % H, n = i / C / W / H;
    // The last windows that read it, and back to the first: its taps in them in the order of their numbers.
    long long down = h + padding, right = w + padding, low = down / stride, far = right / stride;
    low = low < P ? low : P - 1, far = far < Q ? far : Q - 1;
    Wide total = 0;
    for (long long p = low; p >= 0 && down - p * stride < size; --p)
        for (long long q = far; q >= 0 && right - q * stride < size; --q) {
            long long window = ((n * P + p) * Q + q) * C + c;
            if (winners[window] == (down - p * stride) * size + right - q * stride) total += gy[window];
        }
    gx[i] = total;
}
