// decode_attention: attention of one query per sequence over its paged keys and values.
#pragma once

#include "common/kv_pages.h"

namespace voxkern {

using DecodeAttentionParams = PagedAttentionParams;

#ifndef VOX_ISA

inline DecodeAttentionParams decode_attention_params(const Tensor& q, const Tensor& k_pages,
                                                     const Tensor& v_pages,
                                                     const Tensor& page_table,
                                                     const Tensor& seq_lens, double scale,
                                                     const Tensor& out) {
  const DecodeAttentionParams p =
      paged_attention_params(q, k_pages, v_pages, page_table, seq_lens, scale, out);
  check(q.size(0) == p.B, "page_table: expected shape [B, M] with B = ", q.size(0), ", got ",
        shape_string(page_table));
  return p;
}

#endif

}  // namespace voxkern
