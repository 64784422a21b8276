// The machine's peak rates: bytes read per second, and multiply-adds per second in float32,
// bfloat16 and int8. bench/roofline.py compiles this file for the machine it runs on and calls it
// through ctypes.
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

typedef uint64_t word __attribute__((vector_size(kBytes)));
typedef float vfloat __attribute__((vector_size(kBytes)));

namespace {

template <typename F>
void on_threads(int threads, const F& f) {
  std::vector<std::thread> team;
  for (int rank = 1; rank < threads; ++rank) team.emplace_back([&f, rank] { f(rank); });
  f(0);
  for (auto& thread : team) thread.join();
}

}  // namespace

// Reads `bytes` (a multiple of 4096) from `data` `rounds` times. Each thread reads a contiguous
// part as four streams. The result keeps the compiler from dropping the loads.
extern "C" uint64_t read_memory(const char* data, int64_t bytes, int threads, int rounds) {
  std::vector<uint64_t> sums(threads);
  on_threads(threads, [&](int rank) {
    const int64_t part = bytes / threads / 4096 * 4096;
    const char* begin = data + rank * part;
    const int64_t quarter = part / 4;
    word a{}, b{}, c{}, d{};
    for (int round = 0; round < rounds; ++round) {
      for (int64_t i = 0; i < quarter; i += kBytes) {
        const char* p = begin + i;
        __builtin_prefetch(p + 1024);
        __builtin_prefetch(p + quarter + 1024);
        __builtin_prefetch(p + 2 * quarter + 1024);
        __builtin_prefetch(p + 3 * quarter + 1024);
        a ^= *reinterpret_cast<const word*>(p);
        b ^= *reinterpret_cast<const word*>(p + quarter);
        c ^= *reinterpret_cast<const word*>(p + 2 * quarter);
        d ^= *reinterpret_cast<const word*>(p + 3 * quarter);
      }
      asm volatile("" ::: "memory");
    }
    const word all = a ^ b ^ c ^ d;
    sums[rank] = all[0] ^ all[1];
  });
  uint64_t total = 0;
  for (uint64_t sum : sums) total ^= sum;
  return total;
}

// Runs `steps` rounds of 16 independent fused multiply-adds per thread. Returns the total number of
// floating-point operations.
extern "C" double multiply_float32(int64_t steps, int threads) {
  std::vector<float> sinks(threads);
  on_threads(threads, [&](int rank) {
    vfloat acc[16];
    for (auto& a : acc) a = vfloat{} + static_cast<float>(rank);
    const vfloat x = vfloat{} + 0.999f, y = vfloat{} + 1e-3f;
    for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) acc[j] = acc[j] * x + y;
    }
    for (auto& a : acc) sinks[rank] += a[0];
  });
  volatile float sink = sinks[0];
  (void)sink;
  return 2.0 * 16 * (kBytes / 4) * static_cast<double>(steps) * threads;
}

// multiply_float32 with bfloat16 pairs. Returns 0 if the processor has no such instruction.
extern "C" double multiply_bfloat16(int64_t steps, int threads) {
#if defined(__AVX512BF16__)
  std::vector<float> sinks(threads);
  on_threads(threads, [&](int rank) {
    __m512 acc[16];
    for (auto& a : acc) a = _mm512_set1_ps(static_cast<float>(rank));
    const __m512bh x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f));
    for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) acc[j] = _mm512_dpbf16_ps(acc[j], x, x);
    }
    for (auto& a : acc) sinks[rank] += _mm512_cvtss_f32(a);
  });
  volatile float sink = sinks[0];
  (void)sink;
  return 2.0 * 16 * 32 * static_cast<double>(steps) * threads;
#else
  (void)steps;
  (void)threads;
  return 0;
#endif
}

// multiply_float32 with int8: sums of four byte products in an int32, as in the GEMM with packed
// weights. Returns 0 if the processor has no such instructions.
extern "C" double multiply_int8(int64_t steps, int threads) {
#if defined(__AVX2__)
#if defined(__AVX512VNNI__)
  using vint = __m512i;
  const auto spread = [](int value) { return _mm512_set1_epi8(static_cast<char>(value)); };
  const auto dot = [](vint acc, vint x, vint y) { return _mm512_dpbusd_epi32(acc, x, y); };
#else
  using vint = __m256i;
  const auto spread = [](int value) { return _mm256_set1_epi8(static_cast<char>(value)); };
#if defined(__AVXVNNI__)
  const auto dot = [](vint acc, vint x, vint y) { return _mm256_dpbusd_avx_epi32(acc, x, y); };
#else
  const vint ones = _mm256_set1_epi16(1);
  const auto dot = [ones](vint acc, vint x, vint y) {
    asm volatile("" : "+x"(x));  // otherwise all sums share one product
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), ones));
  };
#endif
#endif
  std::vector<int64_t> sinks(threads);
  on_threads(threads, [&](int rank) {
    vint acc[12];
    // All different, otherwise the compiler keeps only one of them.
    for (int j = 0; j < 12; ++j) acc[j] = spread(rank + j);
    const vint x = spread(3), y = spread(5);
    for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
      for (int j = 0; j < 12; ++j) acc[j] = dot(acc[j], x, y);
    }
    for (auto& a : acc) sinks[rank] += a[0];
  });
  volatile int64_t sink = sinks[0];
  (void)sink;
  return 2.0 * 12 * sizeof(vint) * static_cast<double>(steps) * threads;
#else
  (void)steps;
  (void)threads;
  return 0;
#endif
}
