// A block of CUDA threads on a CPU, strict where a GPU is silent.
//
// The tests compile the package's .cu files with an ordinary C++ compiler and this header.  Every CUDA thread is a
// fiber: it runs until it waits for others, at a barrier or in an instruction of the whole warp, and then the next
// one runs.  What a GPU leaves to chance is chosen here, each time the worst:
//
//   - shared memory is full of NaN when a block starts;
//   - asynchronous copies arrive when they are begun, or not before somebody waits for them (`late`);
//   - threads run in the order of their numbers, or in the opposite one (`backwards`);
//   - reading or writing outside of the arrays that the launch was given, at an address that is no multiple of 16
//     where the hardware demands it, and waiting for threads that never come, end the launch with a message;
//   - pieces of shared memory that one instruction reads from the same bank are counted.

#pragma once

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include <ucontext.h>

#include "flushing.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __align__(n) alignas(n)

struct Index { unsigned x = 0, y = 0, z = 0; };

namespace emulator {

struct Barrier { int arrived = 0, phase = 0; };

struct Copy { void* to; const void* from; bool inside; };

struct Fiber {
    ucontext_t start;
    jmp_buf at;
    std::vector<char> stack;
    Index thread;
    bool begun = false, done = false;
    std::vector<std::vector<Copy>> copies{1};  // groups; the last one is open
};

struct Warp { Barrier barrier; const void* pointers[32]; unsigned words[32][6]; };

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline Fiber* current;
inline jmp_buf scheduler;
inline Index block, grid;
inline std::vector<unsigned char> memory;
inline unsigned char* shared_begin;  // a multiple of 128
inline std::size_t shared_size;
inline std::vector<std::pair<const char*, const char*>> arrays;
inline std::function<void()> body;
inline bool late, backwards;
inline long long progress, conflicts;
inline std::string complaint;

inline void yield() {
    if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

[[noreturn]] inline void fail(const std::string& message) {
    if (complaint.empty()) {
        complaint = message + " (block " + std::to_string(block.x) + "," + std::to_string(block.y) + ", thread " +
                    std::to_string(current->thread.x) + ")";
    }
    for (;;) _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier, int members) {
    const int phase = barrier.phase;
    if (++barrier.arrived == members) {
        barrier.arrived = 0, ++barrier.phase, ++progress;
        return;
    }
    while (barrier.phase == phase) yield();
}

inline int lane() { return current->thread.x % 32; }
inline Warp& warp() { return warps[current->thread.x / 32]; }
inline void wait_for_warp() { wait(warp().barrier, 32); }

// `bytes` from `place` on lie in one of the launch's arrays.
inline void check(const void* place, std::size_t bytes, const char* what) {
    const char* first = static_cast<const char*>(place);
    for (const auto& [begin, end] : arrays)
        if (first >= begin && first + bytes <= end) return;
    fail(std::string(what) + " outside of every array");
}

inline void check_shared(const void* place, std::size_t bytes) {
    const auto* first = static_cast<const unsigned char*>(place);
    if (first < shared_begin || first + bytes > shared_begin + shared_size) fail("outside of shared memory");
    if ((first - shared_begin) % bytes) fail("shared memory read or written across a boundary");
}

inline void perform(const Copy& copy) {
    if (copy.inside) std::memcpy(copy.to, copy.from, 16);
    else std::memset(copy.to, 0, 16);
}

inline void enter() {
    body();
    if (current->copies.size() > 1 || !current->copies[0].empty()) {
        for (const auto& group : current->copies)
            if (!group.empty()) fail("a copy that nobody waited for");
    }
    current->done = true, ++progress;
    _longjmp(scheduler, 1);
}

inline void run_block(int threads) {
    std::memset(memory.data(), 0xff, memory.size());
    block_barrier = {}, warps.assign(threads / 32, {});
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.thread = {static_cast<unsigned>(i), 0, 0}, fiber.begun = fiber.done = false, fiber.copies.assign(1, {});
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.data(), fiber.start.uc_stack.ss_size = fiber.stack.size();
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, enter, 0);
    }
    for (volatile bool busy = true; busy && complaint.empty();) {
        const volatile long long before = progress;
        busy = false;
        for (volatile int i = 0; i < threads && complaint.empty(); ++i) {
            current = &fibers[backwards ? threads - 1 - i : i];
            if (current->done) continue;
            busy = true;
            if (!_setjmp(scheduler)) {
                if (current->begun) _longjmp(current->at, 1);
                current->begun = true;
                setcontext(&current->start);
            }
        }
        if (busy && complaint.empty() && progress == before) complaint = "threads wait for others that never come";
    }
}

// Run a kernel, block after block; a message if it went wrong, else "".
inline std::string launch(Index blocks, int threads, std::size_t shared_bytes, std::function<void()> kernel) {
    Flushing flushing;
    body = std::move(kernel), grid = blocks, complaint.clear();
    memory.resize(shared_bytes + 128), shared_size = shared_bytes;
    shared_begin = memory.data() + 128 - reinterpret_cast<std::uintptr_t>(memory.data()) % 128;
    fibers.resize(threads);
    for (Fiber& fiber : fibers) fiber.stack.resize(64 << 10);
    for (block.y = 0; block.y < blocks.y; ++block.y)
        for (block.x = 0; block.x < blocks.x; ++block.x)
            if (complaint.empty()) run_block(threads);
    return complaint;
}

inline float to_float(unsigned bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline unsigned to_bits(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }

// Rows that one instruction reads at once should be spread over all banks of shared memory.
inline void count_conflicts(const void* const* places, int count, int bytes) {
    std::vector<const void*> first(128 / bytes, nullptr);
    for (int i = 0; i < count; ++i) {
        const void*& user = first[(static_cast<const unsigned char*>(places[i]) - shared_begin) / bytes % first.size()];
        if (user && user != places[i]) ++conflicts;
        user = places[i];
    }
}

inline void gather_matrices(unsigned (&to)[4], const void* row, bool transposed) {
    check_shared(row, 16);
    warp().pointers[lane()] = row;
    wait_for_warp();
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const void* const* rows = warp().pointers + 8 * i;
        if (lane() == 0) count_conflicts(rows, 8, 16);
        std::uint16_t two[2];
        for (int k = 0; k < 2; ++k) {
            const int r = transposed ? 2 * t + k : g, c = transposed ? g : 2 * t + k;
            std::memcpy(&two[k], static_cast<const char*>(rows[r]) + 2 * c, 2);
        }
        to[i] = two[0] | static_cast<unsigned>(two[1]) << 16;
    }
    wait_for_warp();
}

// c += a * b, with element (row, k) of a and (k, column) of b read from where the lanes hold them.
template <class A, class B>
void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned* b, int length, A left, B right) {
    unsigned (&mine)[6] = warp().words[lane()];
    std::memcpy(mine, a, 16), std::memcpy(mine + 4, b, 8);
    wait_for_warp();
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; ++i) {
        double sum = c[i];
        for (int k = 0; k < length; ++k)
            sum += static_cast<double>(left(g + i / 2 * 8, k)) * right(k, 2 * t + i % 2);
        c[i] = static_cast<float>(sum);
    }
    wait_for_warp();
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::block)
#define gridDim (emulator::grid)
#define shared (emulator::shared_begin)

inline void __syncthreads() { emulator::wait(emulator::block_barrier, static_cast<int>(emulator::fibers.size())); }

// ---- The functions that the .cu files keep apart. -----------------------------------------------------------------

inline void copy_16(void* to, const void* from, bool inside) {
    emulator::check_shared(to, 16);
    if (inside) emulator::check(from, 16, "a copy");
    if (reinterpret_cast<std::uintptr_t>(from) % 16) emulator::fail("a copy from an address that is no multiple of 16");
    if (!emulator::late) emulator::perform({to, from, inside});
    emulator::current->copies.back().push_back({to, from, inside});
}

inline void close_copies() { emulator::current->copies.emplace_back(); }

template <int OPEN>
void await_copies() {
    auto& groups = emulator::current->copies;
    while (groups.size() > OPEN + 1) {
        if (emulator::late)
            for (const emulator::Copy& copy : groups.front()) emulator::perform(copy);
        groups.erase(groups.begin());
    }
}

inline void load_matrices(unsigned (&to)[4], const void* row) { emulator::gather_matrices(to, row, false); }
inline void load_transposed(unsigned (&to)[4], const void* row) { emulator::gather_matrices(to, row, true); }

inline unsigned load_word(const void* from) {
    emulator::check_shared(from, 4);
    emulator::Warp& warp = emulator::warp();
    warp.pointers[emulator::lane()] = from;
    emulator::wait_for_warp();
    if (emulator::lane() == 0) emulator::count_conflicts(warp.pointers, 32, 4);
    unsigned word;
    std::memcpy(&word, from, 4);
    emulator::wait_for_warp();
    return word;
}

inline unsigned round_tf32(unsigned bits) { return (bits + 0x1000u) & ~0x1fffu; }

inline void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned* b, Bfloat16) {
    const auto* lanes = emulator::warp().words;
    const auto half = [](unsigned word, int k) { return emulator::to_float(k % 2 ? word & 0xffff0000u : word << 16); };
    emulator::multiply(
        c, a, b, 16,
        [&](int row, int k) { return half(lanes[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k); },
        [&](int k, int column) { return half(lanes[column * 4 + k % 8 / 2][4 + k / 8], k); });
}

inline void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned* b, float) {
    const auto* lanes = emulator::warp().words;
    // The hardware reads ten bits of fraction and ignores the rest.
    const auto number = [](unsigned word) { return emulator::to_float(word & ~0x1fffu); };
    emulator::multiply(
        c, a, b, 8, [&](int row, int k) { return number(lanes[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2]); },
        [&](int k, int column) { return number(lanes[column * 4 + k % 4][4 + k / 4]); });
}

inline void store_pair(float* to, float first, float second) {
    emulator::check(to, 8, "a store");
    if (reinterpret_cast<std::uintptr_t>(to) % 8) emulator::fail("a store to an address that is no multiple of 8");
    to[0] = first, to[1] = second;
}

inline unsigned short nearest_bfloat16(float value) {
    const unsigned bits = emulator::to_bits(value);
    if (value != value) return 0x7fff;
    return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void narrow(float value, float& to) { to = value; }
inline void narrow(float value, Bfloat16& to) { to.bits = nearest_bfloat16(value); }
inline float widen(float number) { return number; }
inline float widen(Bfloat16 number) { return emulator::to_float(static_cast<unsigned>(number.bits) << 16); }

inline void store_pair(Bfloat16* to, float first, float second) {
    emulator::check(to, 4, "a store");
    if (reinterpret_cast<std::uintptr_t>(to) % 4) emulator::fail("a store to an address that is no multiple of 4");
    to[0].bits = nearest_bfloat16(first), to[1].bits = nearest_bfloat16(second);
}

struct Pair { float first, second; };

inline Pair load_pair(const float* from) {
    emulator::check(from, 8, "a load");
    if (reinterpret_cast<std::uintptr_t>(from) % 8) emulator::fail("a load from an address that is no multiple of 8");
    return {from[0], from[1]};
}

inline Pair load_pair(const Bfloat16* from) {
    emulator::check(from, 4, "a load");
    if (reinterpret_cast<std::uintptr_t>(from) % 4) emulator::fail("a load from an address that is no multiple of 4");
    return {widen(from[0]), widen(from[1])};
}
