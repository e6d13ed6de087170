// One step of SGD or AdamW, in place and in one pass over memory: sgd.py and adamw.py have the definitions.

extern "C" __global__ void sgd(REAL *p, const REAL *g, REAL *u, long long size, double weight_decay, double momentum,
    double direct, double through)
{
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    REAL d = g[i] + (REAL)weight_decay * p[i];
    REAL velocity = (REAL)momentum * u[i] + d;
    u[i] = velocity;
    p[i] -= (REAL)direct * d + (REAL)through * velocity;
}

extern "C" __global__ void adamw(REAL *p, const REAL *g, REAL *m, REAL *v, long long size, double keep, double beta1,
    double beta2, double eps, double rate)
{
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    REAL mean = m[i] + (g[i] - m[i]) * (REAL)(1 - beta1);
    REAL square = v[i] * (REAL)beta2 + g[i] * g[i] * (REAL)(1 - beta2);
    m[i] = mean;
    v[i] = square;
    p[i] = p[i] * (REAL)keep - (REAL)rate * mean / (sqrt(square) + (REAL)eps);
}
