// Products of matrices whose elements are divided among the lanes of a warp, as ptx.cuh describes:
// the last lane to arrive computes them for all. Included by simt.h.
#pragma once

namespace simt {

// A lane's part of the matrices.
template <typename T>
struct Operands {
  T* d;
  const uint32_t *a, b[2];
};

// The matrices in one place, and their product. k is in the order of the sums: by lane, then by
// word.
template <typename T, int kInWord>
struct Matrices {
  T left[8 * kInWord][16], right[8 * kInWord][8];
  T sums[16][8];

  template <typename F>
  explicit Matrices(const uint64_t (&lanes)[32], const F& element) {
    each(lanes, [&](const Operands<T>& mine, int g, int t) {
      for (int word = 0; word < 2; ++word)
        for (int i = 0; i < kInWord; ++i) {
          const int k = (2 * t + word) * kInWord + i;
          left[k][g] = element(mine.a[2 * word], i);
          left[k][g + 8] = element(mine.a[2 * word + 1], i);
          right[k][g] = element(mine.b[word], i);
        }
      for (int i = 0; i < 4; ++i) sums[g + i / 2 * 8][2 * t + i % 2] = mine.d[i];
    });
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 8 * kInWord; ++k)
        for (int column = 0; column < 8; ++column)
          sums[row][column] += left[k][row] * right[k][column];
    each(lanes, [&](const Operands<T>& mine, int g, int t) {
      for (int i = 0; i < 4; ++i) mine.d[i] = sums[g + i / 2 * 8][2 * t + i % 2];
    });
  }

 private:
  template <typename F>
  static void each(const uint64_t (&lanes)[32], const F& body) {
    for (int lane = 0; lane < 32; ++lane)
      body(*reinterpret_cast<const Operands<T>*>(lanes[lane]), lane / 4, lane % 4);
  }
};

}  // namespace simt

namespace voxkern {

inline void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                          VOX_SIMT_HERE) {
  const simt::Operands<float> mine = {d, a, {b0, b1}};
  simt::exchange({"multiply_bf16", file, line}, 0xffffffff, reinterpret_cast<uintptr_t>(&mine),
                 [](uint64_t (&lanes)[32], uint32_t) {
                   simt::Matrices<float, 2>(lanes, [](uint32_t word, int i) {
                     return __uint_as_float(i ? word & 0xffff0000 : word << 16);
                   });
                 });
}
inline void multiply_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                        int32_t start, VOX_SIMT_HERE) {
  for (int32_t& value : d) value = start;
  const simt::Operands<int32_t> mine = {d, a, {b0, b1}};
  simt::exchange({"multiply_s8", file, line}, 0xffffffff, reinterpret_cast<uintptr_t>(&mine),
                 [](uint64_t (&lanes)[32], uint32_t) {
                   simt::Matrices<int32_t, 4>(lanes, [](uint32_t word, int i) {
                     return static_cast<int8_t>(word >> 8 * i);
                   });
                 });
}

}  // namespace voxkern
