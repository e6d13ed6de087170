// Convolution as one matrix product whose left matrix is never written down.
//
// The textbook lays every window out as a row and multiplies by a column per filter.  Here a block of threads owns
// a 128 x 128 tile of the result and walks along the window, 64 bytes of channels at a time (a "slab").  It copies
// just that piece of 128 windows and of 128 filters into shared memory, three slabs in flight, while the tensor
// cores multiply the piece before.  The rows exist only there, and the rectifier runs before the result leaves.
//
// Read in order: the machine, the plan, the tile, then the three kernels at the end.  Host side: implicit.py.
//
// Activations are (N, S, C), filters (F, k, l, C), both bfloat16 or both float32 (rounded to TF32 on the way to the
// tensor cores); sums are float32 always.  C and F are multiples of 8.  Needs compute capability 8.0.

// ---- The machine: everything that is not plain C++, a line of PTX each. ------------------------------------------
// Without a CUDA compiler the tests bring functions of the same names (tests/cuda_emulator.h).

struct Bfloat16 { unsigned short bits; };  // the upper half of a float

#ifdef __CUDACC__
extern __shared__ __align__(128) unsigned char shared[];

__device__ __forceinline__ unsigned shared_address(const void* place) {
    return static_cast<unsigned>(__cvta_generic_to_shared(place));
}

// Begin to copy 16 bytes into shared memory, or 16 bytes of zeros.
__device__ __forceinline__ void copy_16(void* to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(inside ? 16 : 0) : "memory");
}

// Close the group of copies begun since the last call.
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until all groups of this thread but the newest `OPEN` have arrived.
template <int OPEN>
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(OPEN) : "memory"); }

// Four 8 x 8 matrices of 16-bit numbers.  Lane 8*i + r says where row r of matrix i is; lane l gets of each matrix
// elements (l / 4, 2 * (l % 4)) and the next one.  Of 32-bit numbers they are 8 x 4 matrices, one number for a lane.
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}

// The same matrices transposed: lane l gets elements (2 * (l % 4), l / 4) and the one below.
__device__ __forceinline__ void load_transposed(unsigned (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}

__device__ __forceinline__ unsigned load_word(const void* from) { return *static_cast<const unsigned*>(from); }
// A float32 number rounded to TF32's ten bits of fraction, half away from zero; unrounded it would be cut off.
__device__ __forceinline__ unsigned round_tf32(unsigned bits) {
    unsigned rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
    return rounded;
}

// c += a * b on the warp's tensor core: (16 x 8) += (16 x 16) (16 x 8) for Bfloat16, (16 x 8) (8 x 8) for float.
__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned* b, Bfloat16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned* b, float) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two neighbours of the result, and of what is added to it.
__device__ __forceinline__ void store_pair(float* to, float first, float second) {
    *reinterpret_cast<float2*>(to) = make_float2(first, second);
}

__device__ __forceinline__ void store_pair(Bfloat16* to, float first, float second) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    *reinterpret_cast<unsigned*>(to) = both;
}

struct Pair { float first, second; };

__device__ __forceinline__ Pair load_pair(const float* from) {
    const float2 both = *reinterpret_cast<const float2*>(from);
    return {both.x, both.y};
}

__device__ __forceinline__ Pair load_pair(const Bfloat16* from) {
    const unsigned both = *reinterpret_cast<const unsigned*>(from);
    return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
}

#else
#include "cuda_emulator.h"
#endif

// ---- The plan: which pixels meet which weights.  implicit.py fills it in, as 32-bit integers in this order. ------

constexpr int MOST_LEVELS = 8;

struct Level { int height, width, start, output_height, output_width, output_start; };

// Output (p, q) and tap (i, j) read the input at row h = (p * multiply + i * step + offset) / divide, and at a
// column likewise, unless that is outside of the map or not a whole number: the input gradient of a strided
// convolution is itself such a convolution, with divide = stride.
struct Plan {
    int images, channels, filters, taps_down, taps_right;
    int multiply[2], step[2], offset[2], divide[2];
    int pixels, output_pixels, levels;
    Level level[MOST_LEVELS];
};

struct Place { int image, level, p, q; };  // of an output pixel

__device__ __forceinline__ Place locate(const Plan* plan, int pixel) {
    Place at{pixel / plan->output_pixels, 0, 0, 0};
    int rest = pixel % plan->output_pixels;
    while (at.level + 1 < plan->levels && rest >= plan->level[at.level + 1].output_start) ++at.level;
    rest -= plan->level[at.level].output_start;
    at.p = rest / plan->level[at.level].output_width;
    at.q = rest % plan->level[at.level].output_width;
    return at;
}

// So many pixels further, without a division.
__device__ __forceinline__ void advance(Place& at, const Plan* plan, int pixels) {
    at.q += pixels;
    for (;;) {
        const int P = plan->level[at.level].output_height, Q = plan->level[at.level].output_width;
        while (at.p < P && at.q >= Q) at.q -= Q, ++at.p;
        if (at.p < P) return;
        at.p = 0;  // at.q counts the pixels beyond this level
        if (++at.level == plan->levels) at.level = 0, ++at.image;
    }
}

// What the taps of one output pixel need to know.
struct Window { long long map; int top, left, height, width; };

__device__ __forceinline__ Window window_at(const Plan* plan, const Place& at) {
    const Level& level = plan->level[at.level];
    return {static_cast<long long>(at.image) * plan->pixels + level.start,
            at.p * plan->multiply[0] + plan->offset[0], at.q * plan->multiply[1] + plan->offset[1],
            level.height, level.width};
}

// The input pixel of one tap, counted from the first image's first, or -1 for a zero.
__device__ __forceinline__ long long source(const Plan* plan, const Window& window, int i, int j) {
    int h = window.top + i * plan->step[0], w = window.left + j * plan->step[1];
    if (plan->divide[0] != 1 || plan->divide[1] != 1) {
        if (h % plan->divide[0] || w % plan->divide[1]) return -1;
        h /= plan->divide[0], w /= plan->divide[1];
    }
    const bool inside = h >= 0 && h < window.height && w >= 0 && w < window.width;
    return inside ? window.map + h * window.width + w : -1;
}

// ---- The tile: 128 x 128 numbers of the result, held by eight warps of 64 x 32 each. ------------------------------

constexpr int TILE = 128, THREADS = 256, STAGES = 3;
constexpr int SIDE_BYTES = 8192;                // one operand's slab: 128 x 64 bytes
constexpr int STAGE_BYTES = 2 * SIDE_BYTES;     // 48 KiB of shared memory in all

struct Sums { float at[4][4][4]; };  // [16 rows][8 columns][of a lane: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)]

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_row() { return threadIdx.x / 128 * 64; }
__device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % 4 * 32; }

template <class T> __device__ __forceinline__ void round_all(unsigned (&words)[4]);
template <> __device__ __forceinline__ void round_all<Bfloat16>(unsigned (&)[4]) {}
template <> __device__ __forceinline__ void round_all<float>(unsigned (&words)[4]) {
    for (int i = 0; i < 4; ++i) words[i] = round_tf32(words[i]);
}

// A slab whose rows run along the sum: 128 rows of 64 bytes.  Eight rows apart or side by side, 16-byte pieces that
// are read together lie in different banks.
__device__ __forceinline__ int place_in_row(int row, int piece) { return row * 64 + (piece ^ (row >> 1 & 3)) * 16; }

// sums += left * right', both as rows along the sum.
template <class T>
__device__ __forceinline__ void multiply_rows(Sums& sums, const unsigned char* left, const unsigned char* right) {
    const int l = lane();
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
        unsigned a[4][4], b[2][4];
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            load_matrices(a[i], left + place_in_row(warp_row() + i * 16 + l % 16, half * 2 + l / 16));
            round_all<T>(a[i]);
        }
        #pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int row = warp_column() + j * 16 + l / 16 * 8 + l % 8;
            load_matrices(b[j], right + place_in_row(row, half * 2 + l / 8 % 2));
            round_all<T>(b[j]);
        }
        #pragma unroll
        for (int i = 0; i < 4; ++i)
            #pragma unroll
            for (int j = 0; j < 4; ++j) multiply_add(sums.at[i][j], a[i], b[j / 2] + j % 2 * 2, T{});
    }
}

// A slab whose rows run across the sum: 32 pixels of 128 Bfloat16, or 16 pixels of 128 floats.
__device__ __forceinline__ int place_across(int pixel, int piece, Bfloat16) {
    return pixel * 256 + (piece ^ (pixel & 7)) * 16;
}
__device__ __forceinline__ int place_across(int pixel, int piece, float) {
    return pixel * 512 + (piece ^ (pixel & 3) * 2) * 16;
}

// The pieces of both operands that one instruction multiplies: 16 rows from `row` on, and twice 8 columns.
__device__ __forceinline__ void load_left(unsigned (&a)[4], const unsigned char* slab, int half, int row, Bfloat16 t) {
    const int l = lane(), pixel = half * 16 + l / 16 * 8 + l % 8;
    load_transposed(a, slab + place_across(pixel, row / 8 + l / 8 % 2, t));
}
__device__ __forceinline__ void load_right(unsigned (&b)[4], const unsigned char* slab, int half, int row, Bfloat16 t) {
    const int l = lane(), pixel = half * 16 + l / 8 % 2 * 8 + l % 8;
    load_transposed(b, slab + place_across(pixel, row / 8 + l / 16, t));
}
__device__ __forceinline__ unsigned number_at(const unsigned char* slab, int pixel, int row) {
    return round_tf32(load_word(slab + place_across(pixel, row / 4, 0.f) + row % 4 * 4));
}
__device__ __forceinline__ void load_left(unsigned (&a)[4], const unsigned char* slab, int half, int row, float) {
    const int g = lane() / 4, t = lane() % 4;
    #pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = number_at(slab, half * 8 + t + i / 2 * 4, row + g + i % 2 * 8);
}
__device__ __forceinline__ void load_right(unsigned (&b)[4], const unsigned char* slab, int half, int row, float) {
    const int g = lane() / 4, t = lane() % 4;
    #pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = number_at(slab, half * 8 + t + i % 2 * 4, row + g + i / 2 * 8);
}

// sums += left' * right, both as rows across the sum.
template <class T>
__device__ __forceinline__ void multiply_columns(Sums& sums, const unsigned char* left, const unsigned char* right) {
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
        unsigned a[4][4], b[2][4];
        #pragma unroll
        for (int i = 0; i < 4; ++i) load_left(a[i], left, half, warp_row() + i * 16, T{});
        #pragma unroll
        for (int j = 0; j < 2; ++j) load_right(b[j], right, half, warp_column() + j * 16, T{});
        #pragma unroll
        for (int i = 0; i < 4; ++i)
            #pragma unroll
            for (int j = 0; j < 4; ++j) multiply_add(sums.at[i][j], a[i], b[j / 2] + j % 2 * 2, T{});
    }
}

// Copy slab after slab and multiply, STAGES - 1 copies ahead.  One barrier per slab is enough: whoever passes it has
// finished the slab before, whose memory is the one to be filled next.
template <class Copy, class Multiply>
__device__ __forceinline__ void pipeline(int slabs, Copy copy, Multiply multiply) {
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < slabs) copy(shared + s * STAGE_BYTES);
        close_copies();
    }
    for (int s = 0; s < slabs; ++s) {
        await_copies<STAGES - 2>();
        __syncthreads();
        if (s + STAGES - 1 < slabs) copy(shared + (s + STAGES - 1) % STAGES * STAGE_BYTES);
        close_copies();
        multiply(shared + s % STAGES * STAGE_BYTES);
    }
}

// Hand every pair of the tile to `store(row, column, first, second)`; rows and columns count inside of the tile.
template <class Store>
__device__ __forceinline__ void for_each_pair(const Sums& sums, Store store) {
    const int row = warp_row() + lane() / 4, column = warp_column() + lane() % 4 * 2;
    #pragma unroll
    for (int i = 0; i < 4; ++i)
        #pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float (&four)[4] = sums.at[i][j];
            store(row + i * 16, column + j * 8, four[0], four[1]);
            store(row + i * 16 + 8, column + j * 8, four[2], four[3]);
        }
}

// ---- Forward, and the input gradient by another plan: y = act(scale * (weight * x) + bias + shortcut).--------------------

// Which piece of the windows and filters a thread copies: always the same 16 bytes of a slab, of two rows.
template <class T>
struct Rows {
    static constexpr int PIECE = 16 / sizeof(T), SLAB = 64 / sizeof(T);
    Window window[2];
    int i = 0, j = 0, channel, k;  // the tap and channel the piece begins with, and both as one number

    __device__ void start(const Plan* plan, int first_pixel) {
        for (int r = 0; r < 2; ++r) {
            const int pixel = first_pixel + threadIdx.x / 4 + r * 64;
            // Beyond the last pixel the first one is computed again, and not stored.
            window[r] = window_at(plan, locate(plan, pixel < plan->images * plan->output_pixels ? pixel : 0));
        }
        channel = k = threadIdx.x % 4 * PIECE;
        wrap(plan);
    }
    __device__ void wrap(const Plan* plan) {
        while (channel >= plan->channels) {
            channel -= plan->channels;
            if (++j == plan->taps_right) j = 0, ++i;
        }
    }
    __device__ void copy(unsigned char* stage, const Plan* plan, const T* x, const T* weight, int first_filter) {
        const int length = plan->taps_down * plan->taps_right * plan->channels;
        for (int r = 0; r < 2; ++r) {
            const int row = threadIdx.x / 4 + r * 64, filter = first_filter + row;
            unsigned char* to = stage + place_in_row(row, threadIdx.x % 4);
            const long long pixel = k < length ? source(plan, window[r], i, j) : -1;
            copy_16(to, pixel < 0 ? x : x + pixel * plan->channels + channel, pixel >= 0);
            const bool inside = filter < plan->filters && k < length;
            copy_16(to + SIDE_BYTES, inside ? weight + static_cast<long long>(filter) * length + k : weight, inside);
        }
        k += SLAB, channel += SLAB;
        wrap(plan);
    }
};

template <class T>
__device__ __forceinline__ void convolve(const T* x, const T* weight, const float* scale, const float* bias,
                                         const T* shortcut, T* y, const Plan* plan, int relu) {
    const int tiles = (plan->filters + TILE - 1) / TILE;  // neighbouring blocks share their windows
    const int first_pixel = blockIdx.x / tiles * TILE, first_filter = blockIdx.x % tiles * TILE;
    const int length = plan->taps_down * plan->taps_right * plan->channels;
    Sums sums{};
    Rows<T> rows;
    rows.start(plan, first_pixel);
    pipeline((length + Rows<T>::SLAB - 1) / Rows<T>::SLAB,
             [&](unsigned char* stage) { rows.copy(stage, plan, x, weight, first_filter); },
             [&](unsigned char* stage) { multiply_rows<T>(sums, stage, stage + SIDE_BYTES); });
    for_each_pair(sums, [&](int row, int column, float first, float second) {
        const int pixel = first_pixel + row, filter = first_filter + column;
        if (pixel >= plan->images * plan->output_pixels || filter >= plan->filters) return;
        if (scale) first *= scale[filter], second *= scale[filter + 1];
        if (bias) first += bias[filter], second += bias[filter + 1];
        const long long place = static_cast<long long>(pixel) * plan->filters + filter;
        if (shortcut) {
            const Pair added = load_pair(shortcut + place);
            first += added.first, second += added.second;
        }
        if (relu) first = first < 0 ? 0 : first, second = second < 0 ? 0 : second;  // a NaN stays one
        store_pair(y + place, first, second);
    });
}

// ---- The weight gradient: sums over pixels, shared out over blockIdx.y; the host adds the shares. -----------------

// Which 16 bytes of channels a thread copies of every slab, of two of its pixels.
template <class T>
struct Columns {
    static constexpr int PIECE = 16 / sizeof(T), PIECES = TILE / PIECE, SLAB = SIDE_BYTES / TILE / sizeof(T);
    static constexpr int PIXELS = THREADS / PIECES;  // that are copied at once: half a slab
    Place at[2];
    int pixel, end, i, j, channel, filter;
    bool has_column;

    __device__ void start(const Plan* plan, int first_filter, int first_column, int begin, int stop) {
        const int piece = threadIdx.x % PIECES * PIECE, column = first_column + piece, C = plan->channels;
        pixel = begin + threadIdx.x / PIECES, end = stop, filter = first_filter + piece;
        has_column = column < plan->taps_down * plan->taps_right * C;
        i = column / C / plan->taps_right, j = column / C % plan->taps_right, channel = column % C;
        for (int r = 0; r < 2; ++r) at[r] = locate(plan, pixel + r * PIXELS);
    }
    __device__ void copy(unsigned char* stage, const Plan* plan, const T* x, const T* gy) {
        for (int r = 0; r < 2; ++r) {
            const int here = pixel + r * PIXELS;
            unsigned char* to = stage + place_across(threadIdx.x / PIECES + r * PIXELS, threadIdx.x % PIECES, T{});
            const bool inside = here < end && filter < plan->filters;
            copy_16(to, inside ? gy + static_cast<long long>(here) * plan->filters + filter : gy, inside);
            const bool read = here < end && has_column;
            const long long from = read ? source(plan, window_at(plan, at[r]), i, j) : -1;
            copy_16(to + SIDE_BYTES, from < 0 ? x : x + from * plan->channels + channel, from >= 0);
            advance(at[r], plan, SLAB);
        }
        pixel += SLAB;
    }
};

template <class T>
__device__ __forceinline__ void correlate(const T* x, const T* gy, float* shares, const Plan* plan, int share) {
    const int length = plan->taps_down * plan->taps_right * plan->channels, tiles = (length + TILE - 1) / TILE;
    const int first_filter = blockIdx.x / tiles * TILE, first_column = blockIdx.x % tiles * TILE;
    const int pixels = plan->images * plan->output_pixels, begin = blockIdx.y * share;
    const int end = begin + share < pixels ? begin + share : pixels;
    Sums sums{};
    Columns<T> columns;
    columns.start(plan, first_filter, first_column, begin, end);
    pipeline((end - begin + Columns<T>::SLAB - 1) / Columns<T>::SLAB,
             [&](unsigned char* stage) { columns.copy(stage, plan, x, gy); },
             [&](unsigned char* stage) { multiply_columns<T>(sums, stage, stage + SIDE_BYTES); });
    float* mine = shares + static_cast<long long>(blockIdx.y) * plan->filters * length;
    for_each_pair(sums, [&](int row, int column, float first, float second) {
        const int filter = first_filter + row, k = first_column + column;
        if (filter < plan->filters && k < length)
            store_pair(mine + static_cast<long long>(filter) * length + k, first, second);
    });
}

// ---- What the host calls: THREADS threads, STAGES * STAGE_BYTES of shared memory. ---------------------------------

#define KERNELS(T, name)                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                            \
    convolve_##name(const T* x, const T* weight, const float* scale, const float* bias, const T* shortcut, T* y,     \
                    const Plan* plan, int relu) { convolve<T>(x, weight, scale, bias, shortcut, y, plan, relu); }    \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                            \
    correlate_##name(const T* x, const T* gy, float* shares, const Plan* plan, int share) {                          \
        correlate<T>(x, gy, shares, plan, share); }

KERNELS(Bfloat16, bfloat16) KERNELS(float, float32)
