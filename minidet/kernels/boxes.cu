// Overlaps of all anchors with an image's objects: boxes.py has the definitions.  A thread has one anchor.

// Rounded exactly as `pairwise_iou` rounds it.
__device__ REAL overlap(const REAL *a, const REAL *b)
{
    REAL w = (a[2] < b[2] ? a[2] : b[2]) - (a[0] > b[0] ? a[0] : b[0]);
    REAL h = (a[3] < b[3] ? a[3] : b[3]) - (a[1] > b[1] ? a[1] : b[1]);
    REAL both = w > 0 && h > 0 ? w * h : (REAL)0;
    return both > 0 ? both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both) : (REAL)0;
}

// The bits of numbers that are not negative have the order of the numbers; a maximum has no order of its own.
__device__ void raise(float *at, float value) { atomicMax((int *)at, __float_as_int(value)); }
__device__ void raise(double *at, double value) { atomicMax((long long *)at, __double_as_longlong(value)); }

extern "C" __global__ void best_matches(const REAL *anchors, const REAL *gt, REAL *best_iou, long long *best_gt,
    REAL *gt_best, long long count, long long objects)
{
    long long r = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (r >= count) return;
    REAL best = 0;
    long long who = 0;
    for (long long g = 0; g < objects; ++g) {
        REAL iou = overlap(anchors + 4 * r, gt + 4 * g);
        if (iou > best) { best = iou; who = g; }
        if (iou > gt_best[g]) raise(gt_best + g, iou);
    }
    best_iou[r] = best;
    best_gt[r] = who;
}

extern "C" __global__ void claimed_anchors(const REAL *anchors, const REAL *gt, const REAL *gt_best, bool *claimed,
    long long count, long long objects)
{
    long long r = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (r >= count) return;
    bool any = false;
    for (long long g = 0; g < objects; ++g) any |= overlap(anchors + 4 * r, gt + 4 * g) == gt_best[g];
    claimed[r] = any;
}
