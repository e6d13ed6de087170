// What every library of emulated kernels offers, and the macro that adds a kernel to it.

extern "C" {
void choose(int late, int backwards) {
    emulator::late = late, emulator::backwards = backwards, emulator::conflicts = 0;
}
long long conflicts() { return emulator::conflicts; }
void forget_arrays() { emulator::arrays.clear(); }
void know_array(const char* begin, long long bytes) { emulator::arrays.push_back({begin, begin + bytes}); }
}

inline const char* run(int across, int down, int threads, int shared_bytes, std::function<void()> kernel) {
    emulator::launch({unsigned(across), unsigned(down), 1}, threads, shared_bytes, std::move(kernel));
    return emulator::complaint.c_str();
}

#define REMOVE_PARENTHESES(...) __VA_ARGS__
#define LAUNCH(name, parameters, arguments)                                                                        \
    const char* launch_##name(int across, int down, REMOVE_PARENTHESES parameters) {                               \
        return run(across, down, BLOCK_OF_THREADS, [=] { name arguments; });                                       \
    }
