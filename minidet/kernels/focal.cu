// The focal loss of whole images and its gradient: focal.py has the definition, and every name.

#define IGNORE -2

// Each of an image's threads adds up its own share of the terms; the shares are summed afterwards, in a fixed order.
extern "C" __global__ void focal_loss(const REAL *logits, const long long *labels, REAL *gradient, double *sums,
    long long images, long long threads, long long size, long long classes, double object, double background, double gamma)
{
    long long t = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= images * threads) return;
    long long n = t / threads, first = n * size;
    double sum = 0;
    for (unsigned i = t % threads; i < size; i += threads) {
        unsigned r = i / (unsigned)classes, k = i - r * (unsigned)classes;  // 32 bits: dividing 64 takes far longer
        long long label = labels[n * (size / classes) + r];
        REAL slope = 0;
        if (label != IGNORE) {
            REAL sign = label == k ? 1 : -1, z = sign * logits[first + i], zero = 0, one = 1;
            REAL tail = exp(-fabs(z)), log_tail = log1p(tail);
            REAL cross_entropy = (z < 0 ? -z : zero) + log_tail;
            REAL weight = (REAL)(label == k ? object : background) * exp(-(REAL)gamma * ((z > 0 ? z : zero) + log_tail));
            REAL larger = one / (one + tail), smaller = tail / (one + tail);
            REAL p = z > 0 ? larger : smaller, q = z > 0 ? smaller : larger;
            sum += weight * cross_entropy;
            slope = -sign * weight * ((REAL)gamma * p * cross_entropy + q);
        }
        gradient[first + i] = slope;
    }
    sums[t] = sum;
}
