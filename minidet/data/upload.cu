// The bytes of a padded batch to normalised numbers, and zeros where it is padded: upload.py.  A thread makes one.

extern "C" __global__ void normalise(const unsigned char *images, const long long *sizes, const REAL *levels, REAL *y,
    long long count, long long H, long long W, long long C)
{
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    long long c = i % C, w = i / C % W, h = i / C / W % H, n = i / C / W / H;
    y[i] = h < sizes[2 * n] && w < sizes[2 * n + 1] ? levels[images[i] * C + c] : (REAL)0;
}
