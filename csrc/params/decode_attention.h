// decode_attention: attention of one query per sequence over its paged keys and values.
#pragma once

#include "common/dtype.h"

namespace voxkern {

struct DecodeAttentionParams {
  Dtype dtype;
  int64_t B, Hq, Hkv, D;
  int64_t S, M;   // page size, pages in a row of the table
  const void* q;  // [B, Hq, D]
  int64_t q_stride;
  const void* k_pages;        // [P, Hkv, S, D]
  const void* v_pages;        // [P, Hkv, S, D]
  const int32_t* page_table;  // [B, M]
  const int32_t* seq_lens;    // [B]
  float scale;
  void* out;  // [B, Hq, D]
};

}  // namespace voxkern

#ifndef VOX_ISA
#include "common/kv_pages.h"

namespace voxkern {

inline DecodeAttentionParams decode_attention_params(const Tensor& q, const Tensor& k_pages,
                                                     const Tensor& v_pages,
                                                     const Tensor& page_table,
                                                     const Tensor& seq_lens, double scale,
                                                     const Tensor& out) {
  const Dtype dtype = float_dtype(q, "q");
  check_heads(q, "q", q);
  check_pages(k_pages, v_pages, q);
  check_groups(q, k_pages);
  check_page_table(page_table, seq_lens, q);
  check(page_table.size(0) == q.size(0), "page_table: expected shape [B, M] with B = ", q.size(0),
        ", got ", shape_string(page_table));
  return {
      .dtype = dtype,
      .B = q.size(0),
      .Hq = q.size(1),
      .Hkv = k_pages.size(1),
      .D = q.size(2),
      .S = k_pages.size(2),
      .M = page_table.size(1),
      .q = q.const_data_ptr(),
      .q_stride = q.stride(0),
      .k_pages = k_pages.const_data_ptr(),
      .v_pages = v_pages.const_data_ptr(),
      .page_table = static_cast<const int32_t*>(page_table.const_data_ptr()),
      .seq_lens = static_cast<const int32_t*>(seq_lens.const_data_ptr()),
      .scale = static_cast<float>(scale),
      .out = out.mutable_data_ptr(),
  };
}

}  // namespace voxkern
#endif
