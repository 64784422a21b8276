// The kernels by their Params, for ops that are made of others. Each is defined in its own <op>.cu.
#pragma once

#include "common.cuh"

// The host's pass alone calls them.
#include "../append_kv.h"
#include "../decode_attention.h"
#include "../linear.h"
#include "../rms_norm.h"
#include "../sample_tokens.h"
#include "../silu_mul.h"

namespace voxkern {

void rms_norm(const RmsNormParams& p, cudaStream_t stream);
void silu_mul(const SiluMulParams& p, cudaStream_t stream);
void append_kv(const AppendKvParams& p, cudaStream_t stream);
void sample_tokens(const SampleTokensParams& p, cudaStream_t stream);
// Of a plain weight.
void linear(const LinearParams& p, cudaStream_t stream);
// Floats that `workspace` must hold.
int64_t decode_attention_workspace(const DecodeAttentionParams& p);
void decode_attention(const DecodeAttentionParams& p, float* workspace, cudaStream_t stream);

}  // namespace voxkern
