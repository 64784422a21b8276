#include <climits>

#include "common/arena.h"
#include "cuda/codec/attention.cuh"
#include "cuda/codec/gemm.cuh"
#include "cuda/codec/prologues.cuh"
#include "params/mimi_transformer.h"

// Five launches a layer: norm and qkv; rotation, append of keys and values, attention; o and the
// residual; norm, up and activation; down and the residual. One launch before them computes the
// table of rotations.
namespace voxkern {
namespace {

// The buffers between launches. R = B T.
struct Buffers {
  float *rotations, *qkv, *attended, *hidden;  // [R, D], [R, (Hq + 2 Hkv) D], [R, Hq D], [R, F]

  Buffers(Arena& arena, const MimiTransformerParams& p)
      : rotations(arena.take<float>(p.B * p.T * p.D)),
        qkv(arena.take<float>(p.B * p.T * p.qkv.N)),
        attended(arena.take<float>(p.B * p.T * p.Hq * p.D)),
        hidden(arena.take<float>(p.B * p.T * p.F)) {}
};

template <bool kNormed>
void project(const codec::Rows<kNormed>& rows, int64_t M, const Weight& weight, int64_t layer,
             const float* bias, const float* add, float* out, const Activation* activation,
             cudaStream_t stream) {
  const bool is_bf16 = weight.format == Format::bf16;
  const int64_t bytes = layer * weight.N * weight.C * (is_bf16 ? 2 : 4);
  codec::gemm<false>(
      {
          .M = static_cast<int>(M),
          .N = static_cast<int>(weight.N),
          .K = static_cast<int>(weight.C),
          .weight = static_cast<const char*>(weight.data) + bytes,
          .bias = bias ? bias + layer * weight.N : nullptr,
          .add = add,
          .out = out,
          .activates = activation != nullptr,
          .activation = activation ? *activation : Activation::relu,
      },
      is_bf16, rows, stream);
}

}  // namespace

void mimi_transformer(MimiTransformerParams p, const float* frequencies, void* workspace,
                      cudaStream_t stream) {
  if (p.B * p.T == 0) return;
  Arena arena(workspace);
  const Buffers buffers(arena, p);
  p.rotations = buffers.rotations;
  launch(codec::rotations_kernel,
         {.grid = divide_up(p.B * p.T * p.D / 2, 128), .block = 128, .stream = stream}, p,
         frequencies, buffers.rotations);
  const int64_t M = p.B * p.T;
  const int C = static_cast<int>(p.C);
  for (int64_t layer = 0; layer < p.L; ++layer) {
    const float *const residual = layer ? p.out : p.x, *const norms = p.norms + layer * 4 * C;
    project<true>({residual, C, norms, norms + C, p.eps}, M, p.qkv, layer, p.qkv_bias, nullptr,
                  buffers.qkv, nullptr, stream);
    codec::launch_attention(p, layer, buffers.qkv, buffers.attended, stream);
    project<false>({buffers.attended, static_cast<int>(p.o.C), nullptr, nullptr, 0}, M, p.o, layer,
                   p.o_bias, residual, p.out, nullptr, stream);
    project<true>({p.out, C, norms + 2 * C, norms + 3 * C, p.eps}, M, p.up, layer, nullptr, nullptr,
                  buffers.hidden, &p.activation, stream);
    project<false>({buffers.hidden, static_cast<int>(p.F), nullptr, nullptr, 0}, M, p.down, layer,
                   nullptr, p.out, p.out, nullptr, stream);
  }
}

#ifdef VOX_HOST_PASS
Tensor mimi_transformer_cuda(Tensor x, Tensor positions, Tensor frequencies, Tensor norms,
                             Tensor qkv, Tensor qkv_bias, Tensor o, Tensor o_bias, Tensor up,
                             Tensor down, double eps, std::string activation, Tensor keys,
                             Tensor values, int64_t window) {
  x = torch::stable::contiguous(x);
  MimiTransformerParams p =
      mimi_transformer_params(x, positions, frequencies, norms, qkv, qkv_bias, o, o_bias, up, down,
                              eps, activation, keys, values, window);
  const auto not_packed = [](const Weight& weight, const char* name) {
    check(weight.format == Format::plain || weight.format == Format::bf16, name,
          ": packed weights are not supported on CUDA by the codec's transformer");
  };
  not_packed(p.qkv, "qkv");
  not_packed(p.o, "o");
  not_packed(p.up, "up");
  not_packed(p.down, "down");
  check(p.D <= attention::kMaxHeadDim, "keys: on CUDA expected heads of at most ",
        attention::kMaxHeadDim, " elements, got shape ", shape_string(keys));
  check(p.B * p.T <= INT_MAX, "x: on CUDA expected B T below 2^31, got shape ", shape_string(x));
  if (p.L == 0) return torch::stable::clone(x);
  Tensor out = torch::stable::empty_like(x);
  p.out = static_cast<float*>(out.mutable_data_ptr());
  Tensor workspace = torch::stable::new_empty(x, {arena_bytes<Buffers>(p)}, ScalarType::Byte);
  const OnDevice device(x);
  mimi_transformer(p, static_cast<const float*>(frequencies.const_data_ptr()),
                   workspace.mutable_data_ptr(), device.stream);
  return out;
}

VOX_CUDA_LIBRARY(m) { m.impl("mimi_transformer", TORCH_BOX(&mimi_transformer_cuda)); }
#endif

}  // namespace voxkern
