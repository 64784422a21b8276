#include <climits>
#include <optional>

#include "cuda/codec/conv.cuh"

// codec/conv.cu has the kernels: one for the convolution, one that keeps its past.
#ifdef VOX_HOST_PASS
namespace voxkern {

Tensor mimi_conv_cuda(Tensor x, Tensor past, Tensor weight, Tensor bias, std::optional<Tensor> add,
                      int64_t dilation, bool elu) {
  x = torch::stable::contiguous(x);
  if (add) add = torch::stable::contiguous(*add);
  MimiConvParams p = mimi_conv_params(x, past, weight, bias, add ? &*add : nullptr, dilation, elu);
  check(p.B * p.T <= INT_MAX, "x: on CUDA expected B T below 2^31, got shape ", shape_string(x));
  Tensor out = torch::stable::new_empty(x, {p.B, p.T, p.N});
  p.out = static_cast<float*>(out.mutable_data_ptr());
  const OnDevice device(x);
  mimi_conv(p, {}, device.stream);
  keep_past({{p, {}}}, device.stream);
  return out;
}

VOX_CUDA_LIBRARY(m) { m.impl("mimi_conv", TORCH_BOX(&mimi_conv_cuda)); }

}  // namespace voxkern
#endif
