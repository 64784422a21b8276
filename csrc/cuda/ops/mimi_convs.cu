#include "cuda/codec/conv.cuh"

// One launch for every convolution, and one at the end that stores the pasts of all. So all
// intermediate tensors stay allocated until then, 2.2 MB a frame and stream.
#ifdef VOX_HOST_PASS
#include <climits>

#include "params/mimi_convs.h"

namespace voxkern {

Tensor mimi_convs_cuda(Tensor x, Tensor fresh, std::vector<Tensor> past,
                       std::vector<Tensor> weights, std::vector<Tensor> biases,
                       std::vector<int64_t> plan) {
  std::vector<Tensor> values;
  std::vector<FinishedConv> convs;
  Tensor result;
  const OnDevice device(x);
  result = walk_convs(x, fresh, past, weights, biases, plan,
                      [&](int64_t i, const MimiConvStep& step, const Tensor& from,
                          const Tensor& blocks, const Tensor* add) {
                        MimiConvParams p = mimi_conv_params(blocks, past[i], weights[i], biases[i],
                                                            add, step.dilation, step.elu != 0);
                        check(p.B * p.T <= INT_MAX, "x: on CUDA expected fewer than 2^31 blocks");
                        const Tensor out = torch::stable::new_empty(blocks, {p.B, p.T, p.N});
                        p.out = static_cast<float*>(out.mutable_data_ptr());
                        MimiConvStart start = {.width = from.size(2)};
                        if (step.replicate)
                          start.is_first = static_cast<const bool*>(fresh.const_data_ptr());
                        mimi_conv(p, start, device.stream);
                        values.push_back(blocks);
                        values.push_back(out);
                        convs.push_back({p, start});
                        return out;
                      });
  keep_past(convs, device.stream);
  return result;
}

VOX_CUDA_LIBRARY(m) { m.impl("mimi_convs", TORCH_BOX(&mimi_convs_cuda)); }

}  // namespace voxkern
#endif
