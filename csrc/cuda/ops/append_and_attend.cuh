// decode_attention for prefill_attention, and fused with append_kv for decode_backbone.
// decode_attention.cu defines them.
#pragma once

#include "cuda/runtime/launch.cuh"
#include "params/append_kv.h"
#include "params/decode_attention.h"

namespace voxkern {

// `workspace` holds decode_attention_workspace() floats.
void decode_attention(const DecodeAttentionParams& p, float* workspace, cudaStream_t stream);
int64_t decode_attention_workspace(const DecodeAttentionParams& p);

// Reads lengths, pages, positions and slots, and all keys except those in `slots`, before the wait
// (see the contract in launch.cuh). `workspace` holds decode_attention_workspace() floats,
// `counters` append_and_attend_counters() zeros, which are zeros again at the end.
void append_and_attend(const AppendKvParams& append, const DecodeAttentionParams& p,
                       float* workspace, unsigned* counters, cudaStream_t stream);
int64_t append_and_attend_counters(const DecodeAttentionParams& p);

}  // namespace voxkern
