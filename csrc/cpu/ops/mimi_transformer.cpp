#include "params/mimi_transformer.h"

#include "cpu/runtime/isa.h"

#ifdef VOX_ISA
#include "cpu/attention/split_attention.h"
#include "cpu/gemm/operand.h"
#include "cpu/simd/activation.h"
#include "cpu/simd/norm.h"
#include "cpu/simd/rotary.h"

// One run() of the team computes all layers. A thread computes the same rows of every matrix, and
// some of the heads of the streams, with a barrier after each. Norms and the conversion of GEMM
// inputs take a few microseconds, so every thread computes all of them on its own copy of the
// residual.
//
// Each query walks its keys in blocks from the first key of its window, so no order of sums depends
// on how a stream was cut into steps. Everything is float32 except the GEMM inputs, which are
// converted to the format of the weight.
namespace voxkern {
namespace {

using Params = MimiTransformerParams;

// Buffers shared by the threads. R = B T.
struct Shared {
  float* qkv;       // [R, (Hq + 2 Hkv) D]
  float* attended;  // [R, Hq D]
  float* branch;    // [R, C], the next addend of the residual
  Operand activated;

  Shared(Arena& arena, const Params& p)
      : qkv(arena.take<float>(p.B * p.T * p.qkv.N)),
        attended(arena.take<float>(p.B * p.T * p.Hq * p.D)),
        branch(arena.take<float>(p.B * p.T * p.C)),
        activated(arena, p.down, p.B * p.T, arena.take<float>(p.B * p.T * p.F)) {}
};

// A thread's own buffers.
struct Private {
  float* residual;  // [R, C]
  float* normed;    // [R, C]
  Operand for_qkv, for_o, for_up;
  float* query;  // [padded D]
  float* sums;   // [padded D]

  Private(Arena& arena, const Params& p, const Shared& all)
      : residual(arena.take<float>(p.B * p.T * p.C)),
        normed(arena.take<float>(p.B * p.T * p.C)),
        for_qkv(arena, p.qkv, p.B * p.T, normed),
        for_o(arena, p.o, p.B * p.T, all.attended),
        for_up(arena, p.up, p.B * p.T, normed),
        query(arena.take<float>(padded(p.D))),
        sums(arena.take<float>(padded(p.D))) {}
};

inline void add_row(float* x, const float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] += y[i];
}

class Worker {
 public:
  Worker(const Params& p, const Shared& all, const Private& own, int rank, int size)
      : p_(p), shared_(all), own_(own), rank_(rank), size_(size), rows_(p.B * p.T) {}

  void run() const {
    __builtin_memcpy(own_.residual, p_.x, rows_ * p_.C * sizeof(float));
    for (int64_t layer = 0; layer < p_.L; ++layer) {
      normalise(layer, 0);
      own_.for_qkv.prepare(p_.qkv, rows_, 0, rows_ * p_.C);
      project_part(own_.for_qkv, p_.qkv, layer, p_.qkv_bias, shared_.qkv);
      Team::barrier();
      attend(layer);
      Team::barrier();
      own_.for_o.prepare(p_.o, rows_, 0, rows_ * p_.o.C);
      project_part(own_.for_o, p_.o, layer, p_.o_bias, shared_.branch);
      Team::barrier();
      add_row(own_.residual, shared_.branch, rows_ * p_.C);
      normalise(layer, 2);
      own_.for_up.prepare(p_.up, rows_, 0, rows_ * p_.C);
      activate(layer);
      Team::barrier();
      project_part(shared_.activated, p_.down, layer, nullptr, shared_.branch);
      Team::barrier();
      add_row(own_.residual, shared_.branch, rows_ * p_.C);
    }
    const Range mine = partition(rows_, 1, rank_, size_);
    __builtin_memcpy(p_.out + mine.begin * p_.C, own_.residual + mine.begin * p_.C,
                     (mine.end - mine.begin) * p_.C * sizeof(float));
  }

 private:
  void normalise(int64_t layer, int64_t which) const {
    const float* const scale = p_.norms + (4 * layer + which) * p_.C;
    for (int64_t r = 0; r < rows_; ++r)
      layer_norm_row(own_.residual + r * p_.C, scale, scale + p_.C, own_.normed + r * p_.C, p_.C,
                     p_.eps);
  }

  void project_part(const Operand& x, const Weight& weight, int64_t layer, const float* bias,
                    float* out) const {
    const Range part = partition(weight.N, kRowGrain, rank_, size_);
    project(x, rows_, weight, layer, part, out);
    if (!bias) return;
    for (int64_t r = 0; r < rows_; ++r)
      add_row(out + r * weight.N + part.begin, bias + layer * weight.N + part.begin,
              part.end - part.begin);
  }

  // Computes and activates this thread's columns of `up` and converts them for `down`.
  void activate(int64_t layer) const {
    const Range part = partition(p_.F, kGroup, rank_, size_);
    const int64_t n = part.end - part.begin;
    project(own_.for_up, rows_, p_.up, layer, part, shared_.activated.plain);
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t at = r * p_.F + part.begin;
      float* const row = shared_.activated.plain + at;
      switch (p_.activation) {
        case Activation::gelu: for_each_vector(row, n, [](vfloat v) { return gelu(v); }); break;
        case Activation::gelu_tanh:
          for_each_vector(row, n, [](vfloat v) { return gelu_tanh(v); });
          break;
        case Activation::relu: for_each_vector(row, n, [](vfloat v) { return relu(v); }); break;
        case Activation::silu: for_each_vector(row, n, [](vfloat v) { return silu(v); }); break;
      }
      shared_.activated.prepare(p_.down, rows_, at, at + n);
    }
  }

  void attend(int64_t layer) const {
    const Range mine = partition(p_.B * p_.Hkv, 1, rank_, size_);
    for (int64_t i = mine.begin; i < mine.end; ++i) attend_head(layer, i / p_.Hkv, i % p_.Hkv);
  }

  // Appends the new keys and values of stream b and key/value head h, then attends for its queries.
  void attend_head(int64_t layer, int64_t b, int64_t h) const {
    const int64_t D = p_.D, group = p_.Hq / p_.Hkv, position = p_.positions[b];
    const int64_t ring = ((b * p_.L + layer) * p_.Hkv + h) * p_.capacity * D;
    float *const keys = p_.keys + ring, *const values = p_.values + ring;
    for (int64_t t = 0; t < p_.T; ++t) {
      const float* const row = shared_.qkv + (b * p_.T + t) * p_.qkv.N;
      const int64_t at = (position + t) % p_.capacity * D;
      rotate(row + (p_.Hq + h) * D, p_.rotations + (b * p_.T + t) * D, D, keys + at);
      __builtin_memcpy(values + at, row + (p_.Hq + p_.Hkv + h) * D, D * sizeof(float));
    }
    for (int64_t t = 0; t < p_.T; ++t) {
      const int64_t seen = position + t + 1, count = seen < p_.window ? seen : p_.window;
      for (int64_t head = h * group; head < (h + 1) * group; ++head)
        attend_query(b * p_.T + t, head, keys, values, (seen - count) % p_.capacity, count, t == 0);
    }
  }

  // Attends to the `count` keys from `slot` of the ring on. `first`: the head's first query.
  void attend_query(int64_t r, int64_t head, const float* keys, const float* values, int64_t slot,
                    int64_t count, bool first) const {
    const int64_t D = p_.D, width = padded(D);
    for (int64_t i = 0; i < width; ++i) own_.query[i] = own_.sums[i] = 0;
    rotate(shared_.qkv + r * p_.qkv.N + head * D, p_.rotations + r * D, D, own_.query);
    for (int64_t i = 0; i < D; ++i) own_.query[i] *= p_.scale;
    // The element of the window's key i; the window may wrap around the end of the ring.
    const auto element_of = [&](int64_t i) {
      return (slot + i < p_.capacity ? slot + i : slot + i - p_.capacity) * D;
    };
    SoftmaxState state;
    for (int64_t begin = 0; begin < count; begin += kKeyBlock) {
      const int64_t n = count - begin < kKeyBlock ? count - begin : kKeyBlock;
      KeyBlock<float> block;
      for (int64_t j = 0; j < n + kDots; ++j)
        block.keys[j] = keys + element_of(begin + (j < n ? j : n - 1));
      for (int64_t j = 0; j < n; ++j) block.values[j] = values + element_of(begin + j);
      // The head's first query prefetches: a page is too short for the hardware prefetcher.
      const int64_t next = begin + n, prefetched = first ? count - next : 0;
      for (int64_t j = 0; j < kKeyBlock && j < prefetched; ++j) {
        prefetch(keys + element_of(next + j), D);
        prefetch(values + element_of(next + j), D);
      }
      attend_block<1>(own_.query, width, block, n, D, &state, own_.sums);
    }
    const int64_t at = (r * p_.Hq + head) * D;
    for (int64_t i = 0; i < D; ++i) shared_.attended[at + i] = own_.sums[i] / state.sum;
  }

  const Params& p_;
  const Shared& shared_;
  const Private& own_;
  const int rank_, size_;
  const int64_t rows_;
};

}  // namespace

namespace VOX_ISA {
void mimi_transformer(const MimiTransformerParams& p) { run_workers<Worker, Private, Shared>(p); }
}  // namespace VOX_ISA

}  // namespace voxkern

#else

#include <vector>

namespace voxkern {

VOX_KERNEL(mimi_transformer, MimiTransformerParams)

namespace {

// The cosines and sines [B, T, D] of the rotations. As in torch, the angle is a float32 product.
std::vector<float> rotations(const MimiTransformerParams& p, const float* frequencies) {
  std::vector<float> table(p.B * p.T * p.D);
  float* row = table.data();
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t t = 0; t < p.T; ++t, row += p.D)
      for (int64_t i = 0; i < p.D / 2; ++i) {
        const float angle = static_cast<float>(p.positions[b] + t) * frequencies[i];
        row[i] = std::cos(angle);
        row[p.D / 2 + i] = std::sin(angle);
      }
  return table;
}

Tensor mimi_transformer_cpu(Tensor x, Tensor positions, Tensor frequencies, Tensor norms,
                            Tensor qkv, Tensor qkv_bias, Tensor o, Tensor o_bias, Tensor up,
                            Tensor down, double eps, std::string activation, Tensor keys,
                            Tensor values, int64_t window) {
  x = torch::stable::contiguous(x);
  MimiTransformerParams p =
      mimi_transformer_params(x, positions, frequencies, norms, qkv, qkv_bias, o, o_bias, up, down,
                              eps, activation, keys, values, window);
  for (int64_t b = 0; b < p.B; ++b)
    check(p.positions[b] >= 0, "positions: stream ", b, " is at ", p.positions[b]);
  const auto table = rotations(p, static_cast<const float*>(frequencies.const_data_ptr()));
  p.rotations = table.data();
  Tensor out = torch::stable::empty_like(x);
  p.out = static_cast<float*>(out.mutable_data_ptr());
  if (p.B * p.T > 0) mimi_transformer(p);
  return out;
}

}  // namespace
}  // namespace voxkern

STABLE_TORCH_LIBRARY_IMPL(voxkern, CPU, m) {
  m.impl("mimi_transformer", TORCH_BOX(&voxkern::mimi_transformer_cpu));
}

#endif
