// Group normalization of a pyramid, its gradient, and a norm with fixed statistics: see normalization.py.
//
// A thread has a run of pixels in one channel of one level, so that neighbouring threads read neighbouring numbers.
// Each adds up its run and `gather` adds up the runs, in double precision and in an order that only sizes decide.

// The rows of `plan`: the first pixel of each level, and its first run; each ends with where a next level would begin.
struct Run {
    long long images, n, level, c, group, begin, end, pivot, count;  // elements begin, begin + C, ... before end
    bool first;  // of its level and group

    __device__ Run(long long t, const long long *plan, long long levels, long long S, long long C, long long groups,
        long long length, long long threads)
    {
        const long long *starts = plan, *firsts = plan + levels + 1;
        long long runs = firsts[levels], r = t / C % runs, width = C / groups;
        images = threads / C / runs, n = t / C / runs, c = t % C, group = c / width, level = 0;
        while (r >= firsts[level + 1]) ++level;
        long long start = starts[level], stop = starts[level + 1], pixel = start + (r - firsts[level]) * length;
        begin = (n * S + pixel) * C + c;
        end = (n * S + (pixel + length < stop ? pixel + length : stop)) * C;
        pivot = (n * S + start) * C + group * width;
        count = (stop - start) * width;
        first = r == firsts[level] && c % width == 0;
    }
};

// Sums of x - pivot and of its square, with an element of the group for the pivot, so that a large mean cancels little.
extern "C" __global__ void moments(const REAL *__restrict__ x, double *__restrict__ sums, const long long *plan,
    long long threads, long long levels, long long S, long long C, long long groups, long long length,
    double eps, long long relu)
{
    long long t = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= threads) return;
    Run run(t, plan, levels, S, C, groups, length, threads);
    double total = 0, square = 0, pivot = x[run.pivot];
    for (long long i = run.begin; i < run.end; i += C) {
        double d = x[i] - pivot;
        total += d;
        square += d * d;
    }
    sums[t] = total;
    sums[threads + t] = square;
}

// In every level and column, `shares` sums of every shares-th row: to (M, levels, shares, C) from M times `bounds` rows.
extern "C" __global__ void gather(const double *from, double *to, const long long *bounds, long long threads,
    long long levels, long long shares, long long C)
{
    long long t = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= threads) return;
    long long c = t % C, share = t / C % shares, level = t / C / shares % levels, m = t / C / shares / levels;
    double total = 0;
    for (long long r = bounds[level] + share; r < bounds[level + 1]; r += shares)
        total += from[(m * bounds[levels] + r) * C + c];
    to[t] = total;
}

extern "C" __global__ void normalize(const REAL *__restrict__ x, const Wide *weight, const Wide *bias,
    const double *sums, const REAL *__restrict__ shortcut, long long added, Wide *statistics,
    REAL *__restrict__ y, const long long *plan, long long threads,
    long long levels, long long S, long long C, long long groups, long long length, double eps,
    long long relu)
{
    long long t = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= threads) return;
    Run run(t, plan, levels, S, C, groups, length, threads);
    long long width = C / groups, place = run.n * levels + run.level;
    double total = 0, square = 0;
    for (long long i = place * C + run.group * width; i < place * C + (run.group + 1) * width; ++i) {
        total += sums[i];
        square += sums[run.images * levels * C + i];
    }
    double away = total / run.count, spread = square / run.count - away * away;
    Wide mean = x[run.pivot] + away, variance = spread > 0 || spread != spread ? spread : 0;
    Wide scale = 1 / sqrt(variance + (Wide)eps), slope = weight[run.c], offset = bias[run.c];
    if (run.first) {
        statistics[place * groups + run.group] = mean;
        statistics[(run.images * levels + place) * groups + run.group] = variance;
    }
    for (long long i = run.begin; i < run.end; i += C) {
        Wide value = (x[i] - mean) * scale * slope + offset;
        if (added) value += shortcut[i];
        y[i] = relu && value < 0 ? (Wide)0 : value;
    }
}

// Sums of dL/dy and of dL/dy * n, n = (x - mean) * scale; of a rectified y, dL/dy counts where y > 0.
extern "C" __global__ void gradient_sums(const REAL *__restrict__ x, const REAL *__restrict__ gy,
    const REAL *__restrict__ y, const Wide *statistics, double *__restrict__ sums, const long long *plan,
    long long threads, long long levels, long long S, long long C, long long groups, long long length,
    double eps, long long relu)
{
    long long t = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= threads) return;
    Run run(t, plan, levels, S, C, groups, length, threads);
    const Wide *of_group = statistics + (run.n * levels + run.level) * groups + run.group;
    Wide mean = *of_group, scale = 1 / sqrt(of_group[run.images * levels * groups] + (Wide)eps);
    double total = 0, along = 0;
    for (long long i = run.begin; i < run.end; i += C) {
        Wide g = !relu || y[i] > 0 ? gy[i] : (REAL)0;
        total += g;
        along += g * ((x[i] - mean) * scale);
    }
    sums[t] = total;
    sums[threads + t] = along;
}

extern "C" __global__ void gradient(const REAL *__restrict__ x, const REAL *__restrict__ gy,
    const REAL *__restrict__ y, const Wide *weight, const Wide *statistics, const double *sums,
    REAL *__restrict__ gx, const long long *plan, long long threads, long long levels, long long S, long long C,
    long long groups, long long length, double eps, long long relu)
{
    long long t = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= threads) return;
    Run run(t, plan, levels, S, C, groups, length, threads);
    long long width = C / groups, place = run.n * levels + run.level;
    double total = 0, along = 0;
    for (long long c = run.group * width; c < (run.group + 1) * width; ++c) {
        total += weight[c] * sums[place * C + c];
        along += weight[c] * sums[(run.images * levels + place) * C + c];
    }
    const Wide *of_group = statistics + place * groups + run.group;
    Wide mean = *of_group, scale = 1 / sqrt(of_group[run.images * levels * groups] + (Wide)eps), slope = weight[run.c];
    Wide mean_g = total / run.count, mean_gn = along / run.count;
    for (long long i = run.begin; i < run.end; i += C) {
        Wide g = !relu || y[i] > 0 ? gy[i] : (REAL)0, n = (x[i] - mean) * scale;
        gx[i] = scale * (g * slope - (mean_g + n * mean_gn));
    }
}

extern "C" __global__ void to_affine(const Wide *weight, const Wide *bias, const Wide *mean, const Wide *variance,
    Wide *affine, long long C, double eps)
{
    long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    Wide scale = weight[c] / sqrt(variance[c] + (Wide)eps);
    affine[c] = scale;
    affine[C + c] = bias[c] - mean[c] * scale;
}
