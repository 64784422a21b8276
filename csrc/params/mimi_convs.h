// mimi_convs: a sequence of mimi_conv calls described by a plan. Host only.
#pragma once

#include "common/check.h"

namespace voxkern {

// One convolution, in the layout of the plan (voxkern.ops.mimi_convs documents the fields).
struct MimiConvStep {
  int64_t input, add, dilation, elu, block_in, block_out, replicate;
};

// Returns the output of the last convolution. conv(i, step, from, blocks, add) computes convolution
// i of `blocks`, a view of the samples `from` as blocks; `add` may be null.
template <typename Conv>
Tensor walk_convs(const Tensor& x, const Tensor& fresh, const std::vector<Tensor>& past,
                  const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                  const std::vector<int64_t>& plan, const Conv& conv) {
  check_dim(x, "x", 3);
  check_dtype(x, "x", ScalarType::Float);
  check_operand(fresh, "fresh", x, ScalarType::Bool);
  check_shape(fresh, "fresh", "[B]", {x.size(0)});
  const auto n = static_cast<int64_t>(weights.size());
  const auto counts = [&](size_t size, const char* name, int64_t each) {
    check(static_cast<int64_t>(size) == n * each, name, ": expected ", n * each,
          " entries, as there are ", n, " weights, got ", size);
  };
  counts(past.size(), "past", 1);
  counts(biases.size(), "biases", 1);
  counts(plan.size(), "plan", sizeof(MimiConvStep) / sizeof(int64_t));
  const auto* const steps = reinterpret_cast<const MimiConvStep*>(plan.data());

  std::vector<int64_t> last_use(n + 1, 0);
  for (int64_t i = 0; i < n; ++i) {
    const MimiConvStep& step = steps[i];
    check(step.input >= 0 && step.input <= i && step.add >= -1 && step.add <= i,
          "plan: convolution ", i, " reads an output that does not exist yet");
    check(step.block_in >= 1 && step.block_out >= 1, "plan: expected blocks of 1 or more");
    last_use[step.input] = i;
    if (step.add >= 0) last_use[step.add] = i;
  }

  std::vector<Tensor> values = {torch::stable::contiguous(x)};
  for (int64_t i = 0; i < n; ++i) {
    const MimiConvStep& step = steps[i];
    const Tensor from = values[step.input];
    const int64_t B = from.size(0), T = from.size(1) / step.block_in;
    check(from.size(1) % step.block_in == 0, "x: expected whole blocks of ", step.block_in);
    check_dim(past[i], "past", 3);
    check_operand(past[i], "past", x, ScalarType::Float);
    const Tensor blocks =
        step.block_in == 1 ? from : torch::stable::view(from, {B, T, from.size(2) * step.block_in});
    check_shape(past[i], "past", "[B, context, C]", {B, kAny, blocks.size(2)});
    const Tensor out = conv(i, step, from, blocks, step.add >= 0 ? &values[step.add] : nullptr);
    check(out.size(2) % step.block_out == 0, "biases: expected whole blocks of ", step.block_out);
    values.push_back(
        step.block_out == 1
            ? out
            : torch::stable::view(out, {B, T * step.block_out, out.size(2) / step.block_out}));
    // Free the outputs that no later convolution reads; on a CPU this frees cache, too.
    for (int64_t j = 0; j <= i; ++j)
      if (last_use[j] <= i) values[j] = Tensor();
  }
  return values.back();
}

}  // namespace voxkern
