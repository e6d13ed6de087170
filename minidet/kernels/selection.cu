// The largest probabilities of every row, without sorting it: selection.py has the definition.
//
// An element that passes the threshold has a key of 64 bits: its probability, whose bits have the order of the
// number, above its position, turned around so that the lower of two equal ones has the larger key.  No two keys
// are equal, so the count-th largest is a sharp limit.  It is found a byte at a time, the highest first: `count`
// how many keys have each value of the byte, among those that agree with the limit so far, and `pick` the value.

typedef unsigned long long Key;

__device__ Key key_of(REAL x, unsigned position, float threshold)
{
    float tail = exp(-fabs(x)), one = 1;
    float score = x >= 0 ? one / (one + tail) : tail / (one + tail);
    return score > threshold ? (Key)(unsigned)__float_as_int(score) << 32 | (0xffffffffu - position) : 0;
}

extern "C" __global__ void count(const REAL *logits, const long long *limits, int *counts, long long rows,
    long long threads, long long size, double threshold, long long shift)
{
    long long t = (long long)blockIdx.x * blockDim.x + threadIdx.x, n = t / threads;
    if (t >= rows * threads) return;
    for (long long i = t % threads; i < size; i += threads) {
        Key key = key_of(logits[n * size + i], i, threshold);
        // Shifted in two steps: by 64 at once is undefined.
        if (key && key >> shift >> 8 == (Key)limits[n] >> shift >> 8) atomicAdd(counts + 256 * n + (key >> shift & 255), 1);
    }
}

// A thread for each row.  Where fewer pass than are wanted every byte is 0, and all of them are above the limit.
extern "C" __global__ void pick(int *counts, long long *limits, long long *wanted, long long rows, long long shift)
{
    long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= rows) return;
    for (int byte = 255; byte > 0; --byte) {
        if (counts[256 * n + byte] >= wanted[n]) { limits[n] |= (long long)byte << shift; break; }
        wanted[n] -= counts[256 * n + byte];
    }
    for (int byte = 0; byte < 256; ++byte) counts[256 * n + byte] = 0;
}

// The order in which threads find a place changes from run to run; sorting the keys undoes that.
extern "C" __global__ void collect(const REAL *logits, const long long *limits, int *found, long long *keys,
    long long rows, long long threads, long long size, long long most, double threshold)
{
    long long t = (long long)blockIdx.x * blockDim.x + threadIdx.x, n = t / threads;
    if (t >= rows * threads) return;
    for (long long i = t % threads; i < size; i += threads) {
        Key key = key_of(logits[n * size + i], i, threshold);
        if (key && key >= (Key)limits[n]) keys[n * most + atomicAdd(found + n, 1)] = -(long long)key;
    }
}

extern "C" __global__ void unpack(const long long *keys, long long *positions, REAL *scores, long long size)
{
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    Key key = -keys[i];
    positions[i] = key ? 0xffffffffu - (unsigned)key : 0;
    scores[i] = key ? __int_as_float(key >> 32) : -1;
}
