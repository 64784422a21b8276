// prefill_attention: causal attention of ragged prompts over paged keys and values.
#pragma once

#include "common/kv_pages.h"

namespace voxkern {

struct PrefillAttentionParams : PagedAttentionParams {
  int64_t T;
  const int32_t* cu_seqlens;  // [B + 1]
};

#ifndef VOX_ISA

inline PrefillAttentionParams prefill_attention_params(
    const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& page_table,
    const Tensor& cu_seqlens, const Tensor& seq_lens, double scale, const Tensor& out) {
  const PagedAttentionParams paged =
      paged_attention_params(q, k_pages, v_pages, page_table, seq_lens, scale, out);
  check_operand(cu_seqlens, "cu_seqlens", q, ScalarType::Int);
  check_shape(cu_seqlens, "cu_seqlens", "[B + 1]", {paged.B + 1});
  return {paged, q.size(0), static_cast<const int32_t*>(cu_seqlens.const_data_ptr())};
}

#endif

}  // namespace voxkern
