// Multiply-adds from registers only: the rate that no float32 kernel can exceed.
//
//   a_r ← a_r · x + y     12 independent accumulators a thread: latency 4 × 2 units, and some slack
//
// Built and called by bench/machine.py.

#include <chrono>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
typedef float Vector __attribute__((vector_size(BYTES)));
constexpr int LANES = BYTES / sizeof(float), ACCUMULATORS = 12;

static void multiply_add(long iterations, float x, float y, float* result) {
    Vector a[ACCUMULATORS], vx = x - Vector{}, vy = y - Vector{};
    for (int r = 0; r < ACCUMULATORS; ++r) a[r] = float(r) - Vector{};
    for (long i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
        for (int r = 0; r < ACCUMULATORS; ++r) a[r] = a[r] * vx + vy;
    }
    for (int r = 1; r < ACCUMULATORS; ++r) a[0] += a[r];
    *result = a[0][0];  // or the compiler drops it all
}

// Floating-point operations per second of all threads together.
extern "C" double multiply_add_rate(int threads, long iterations) {
    std::vector<float> results(threads);
    std::vector<std::thread> team;
    auto start = std::chrono::steady_clock::now();
    for (int t = 0; t < threads; ++t)
        team.emplace_back(multiply_add, iterations, 0.999f, 0.001f, &results[t]);
    for (auto& member : team) member.join();
    std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    return 2.0 * LANES * ACCUMULATORS * iterations * threads / elapsed.count();
}
