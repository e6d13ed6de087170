// Bytes to numbers and to another size: resample.py has the definition.

extern "C" __global__ void resample(const unsigned char *image, const REAL *levels, REAL *y, long long H, long long W,
    long long C, long long height, long long width)
{
    long long k = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= height * width * C) return;
    long long c = k % C, j = k / C % width, i = k / C / width;
    double row = (i + 0.5) * ((double)H / height) - 0.5, column = (j + 0.5) * ((double)W / width) - 0.5;
    row = row > 0 ? row : 0;
    column = column > 0 ? column : 0;
    long long top = row, left = column, bottom = top + 1 < H ? top + 1 : top, right = left + 1 < W ? left + 1 : left;
    REAL down = row - top, along = column - left;
#define PIXEL(h, w) levels[image[((h) * W + (w)) * C + c] * C + c]
    REAL first = PIXEL(top, left) + down * (PIXEL(bottom, left) - PIXEL(top, left));
    REAL second = PIXEL(top, right) + down * (PIXEL(bottom, right) - PIXEL(top, right));
    y[k] = first + along * (second - first);
}
