#include "params/mimi_conv.h"

#include "cpu/runtime/isa.h"

#ifdef VOX_ISA
#include "cpu/gemm/codec_gemm.h"
#include "cpu/runtime/team.h"
#include "cpu/simd/activation.h"

// A GEMM of W with windows of x: the window of an output row holds its J taps. Threads partition
// the rows of the output if there are many, otherwise its columns. Each thread builds its own
// windows, so none waits for another. Sums and bias are float32; a bfloat16 weight rounds the
// windows to bfloat16.
namespace voxkern {
namespace {

// Bytes of windows that a thread builds at a time: they stay in its L2 during the pass over W.
constexpr int64_t kWindowBytes = 128 << 10;
// With at least this many rows per thread, it is cheaper for every thread to read all of W than to
// build all windows.
constexpr int64_t kOwnRows = 32;

// Copies n samples, through an ELU if with_elu, to the dtype of the weight.
template <typename T>
inline void copy_row(const float* x, bool with_elu, T* out, int64_t n) {
  const auto f = [&](vfloat v) { return with_elu ? elu(v) : v; };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, f(load(x + i)));
  if (i < n) store_n(out + i, f(load_n(x + i, n - i)), n - i);
}

// Builds the windows of rows first .. first + rows of the output.
template <typename T>
void fill_windows(const MimiConvParams& p, int64_t first, int64_t rows, T* windows) {
  const int64_t context = p.context(), K = p.J * p.C;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t b = (first + r) / p.T, t = (first + r) % p.T;
    T* const window = windows + r * K;
    // Copy all but the newest tap from the window one dilation earlier.
    const bool copied = r >= p.dilation && t >= p.dilation;
    if (copied) __builtin_memcpy(window, window - p.dilation * K + p.C, (K - p.C) * sizeof(T));
    for (int64_t j = copied ? p.J - 1 : 0; j < p.J; ++j) {
      const int64_t i = t + j * p.dilation;
      const float* const from =
          i < context ? p.past + (b * context + i) * p.C : p.x + (b * p.T + i - context) * p.C;
      copy_row(from, p.elu, window + j * p.C, p.C);
    }
  }
}

// Stores columns n .. n + kWidth of output row r, up to N, after adding the bias and `add`.
VOX_INLINE void store_sums(const MimiConvParams& p, int64_t r, int64_t n, vfloat sum) {
  const int64_t at = r * p.N + n, rest = p.N - n;
  if (rest >= kWidth) {
    sum += load(p.bias + n);
    store(p.out + at, p.add ? sum + load(p.add + at) : sum);
  } else {
    sum += load_n(p.bias + n, rest);
    store_n(p.out + at, p.add ? sum + load_n(p.add + at, rest) : sum, rest);
  }
}

// Updates `past` to the last `context` samples of past and x.
void update_past(const MimiConvParams& p) {
  const int64_t context = p.context();
  const int64_t kept = context > p.T ? context - p.T : 0, taken = context - kept;
  if (context == 0) return;
  for (int64_t b = 0; b < p.B; ++b) {
    float* const to = p.past + b * context * p.C;
    __builtin_memmove(to, to + (context - kept) * p.C, kept * p.C * sizeof(float));
    if (taken > 0)
      __builtin_memcpy(to + kept * p.C, p.x + (b * p.T + p.T - taken) * p.C,
                       taken * p.C * sizeof(float));
  }
}

// Computes `columns` of output rows first .. first + rows from their windows.
template <typename T>
void multiply_windows(const MimiConvParams& p, const T* windows, int64_t first, int64_t rows,
                      const Range& columns) {
  codec_gemm(windows, rows, p.J * p.C, p.weight, columns.begin, columns.end,
             [&](int64_t m, int64_t n, vfloat sum) { store_sums(p, first + m, n, sum); });
}

template <typename T>
void convolve(const MimiConvParams& p, int rank, int size) {
  const int64_t rows = p.B * p.T, K = p.J * p.C;
  const bool by_row = rows >= kOwnRows * size;
  const Range mine = by_row ? partition(rows, 1, rank, size) : Range{0, rows};
  const Range columns = by_row ? Range{0, p.N} : partition(p.N, kBlockRows, rank, size);
  if (mine.begin == mine.end || columns.begin == columns.end) return;
  const int64_t fitting =
      kWindowBytes / (K * static_cast<int64_t>(sizeof(T))) / kCodecTileM * kCodecTileM;
  const int64_t max_rows = fitting < kCodecTileM ? kCodecTileM : fitting;
  const int64_t block = max_rows < rows ? max_rows : rows;
  T* const windows = static_cast<T*>(__builtin_malloc(block * K * sizeof(T)));
  for (int64_t first = mine.begin; first < mine.end; first += block) {
    const int64_t n = mine.end - first < block ? mine.end - first : block;
    fill_windows(p, first, n, windows);
    multiply_windows(p, windows, first, n, columns);
  }
  __builtin_free(windows);
}

}  // namespace

namespace VOX_ISA {
void mimi_conv(const MimiConvParams& p) {
  auto job = [&](int rank, int size) {
    p.dtype == Dtype::f32 ? convolve<float>(p, rank, size) : convolve<bf16>(p, rank, size);
  };
  if (p.B * p.T * p.N * p.J * p.C < kMinTeamWork)
    job(0, 1);
  else
    run_team(job);
  update_past(p);
}
}  // namespace VOX_ISA

}  // namespace voxkern

#else

#include <cstring>
#include <optional>
#include <vector>

#include "params/mimi_convs.h"

namespace voxkern {

VOX_KERNEL(mimi_conv, MimiConvParams)

namespace {

Tensor mimi_conv_cpu(Tensor x, Tensor past, Tensor weight, Tensor bias, std::optional<Tensor> add,
                     int64_t dilation, bool elu) {
  x = torch::stable::contiguous(x);
  if (add) add = torch::stable::contiguous(*add);
  MimiConvParams p = mimi_conv_params(x, past, weight, bias, add ? &*add : nullptr, dilation, elu);
  Tensor out = torch::stable::new_empty(x, {p.B, p.T, p.N});
  p.out = static_cast<float*>(out.mutable_data_ptr());
  mimi_conv(p);
  return out;
}

// Fills the past of new streams with copies of the first sample of x.
void replicate(const Tensor& x, const bool* fresh, const Tensor& past) {
  const int64_t B = x.size(0), C = x.size(2), length = past.size(1) * past.size(2);
  if (x.size(1) == 0) return;
  const auto* from = static_cast<const float*>(x.const_data_ptr());
  auto* to = static_cast<float*>(past.mutable_data_ptr());
  for (int64_t b = 0; b < B; ++b)
    for (int64_t i = 0; fresh[b] && i < length; i += C)
      std::memcpy(to + b * length + i, from + b * x.size(1) * C, C * sizeof(float));
}

Tensor mimi_convs_cpu(Tensor x, Tensor fresh, std::vector<Tensor> past, std::vector<Tensor> weights,
                      std::vector<Tensor> biases, std::vector<int64_t> plan) {
  return walk_convs(x, fresh, past, weights, biases, plan,
                    [&](int64_t i, const MimiConvStep& step, const Tensor& from,
                        const Tensor& blocks, const Tensor* add) {
                      if (step.replicate)
                        replicate(from, static_cast<const bool*>(fresh.const_data_ptr()), past[i]);
                      return mimi_conv_cpu(blocks, past[i], weights[i], biases[i],
                                           add ? std::optional<Tensor>(*add) : std::nullopt,
                                           step.dilation, step.elu != 0);
                    });
}

}  // namespace
}  // namespace voxkern

STABLE_TORCH_LIBRARY_IMPL(voxkern, CPU, m) {
  m.impl("mimi_conv", TORCH_BOX(&voxkern::mimi_conv_cpu));
  m.impl("mimi_convs", TORCH_BOX(&voxkern::mimi_convs_cpu));
}

#endif
