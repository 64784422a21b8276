// append_kv: rotates q and k, and writes k and v to their slots of the paged KV cache.
#pragma once

#include "common/kv_pages.h"

namespace voxkern {

struct AppendKvParams {
  Dtype dtype;
  int64_t T, Hq, Hkv, D, S;
  void* q;  // [T, Hq, D], rotated in place
  int64_t q_stride;
  const void* k;  // [T, Hkv, D]
  int64_t k_stride;
  const void* v;  // [T, Hkv, D]
  int64_t v_stride;
  const float* rope_table;   // [max_positions, D], cosines | sines
  const int64_t* positions;  // [T]
  const int64_t* slots;      // [T], page * S + offset, negative for none
  void* k_pages;             // [P, Hkv, S, D]
  void* v_pages;             // [P, Hkv, S, D]
};

#ifndef VOX_ISA

inline AppendKvParams append_kv_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& rope_table, const Tensor& positions,
                                       const Tensor& slots, const Tensor& k_pages,
                                       const Tensor& v_pages) {
  const Dtype dtype = float_dtype(q, "q");
  check_heads(q, "q", q);
  const int64_t T = q.size(0), D = q.size(2);
  check(T <= 1 || q.stride(0) >= q.size(1) * D, "q: expected tokens that do not overlap");
  check(D % 2 == 0, "q: expected an even head width D, got shape ", shape_string(q));
  check_pages(k_pages, v_pages, q);
  const int64_t Hkv = k_pages.size(1);
  check_heads(k, "k", q);
  check_shape(k, "k", "[T, Hkv, D]", {T, Hkv, D});
  check_heads(v, "v", q);
  check_shape(v, "v", "[T, Hkv, D]", {T, Hkv, D});
  check_operand(rope_table, "rope_table", q, ScalarType::Float);
  check_shape(rope_table, "rope_table", "[max_positions, D]", {kAny, D});
  check_operand(positions, "positions", q, ScalarType::Long);
  check_shape(positions, "positions", "[T]", {T});
  check_operand(slots, "slots", q, ScalarType::Long);
  check_shape(slots, "slots", "[T]", {T});
  return {
      .dtype = dtype,
      .T = T,
      .Hq = q.size(1),
      .Hkv = Hkv,
      .D = D,
      .S = k_pages.size(2),
      .q = q.mutable_data_ptr(),
      .q_stride = q.stride(0),
      .k = k.const_data_ptr(),
      .k_stride = k.stride(0),
      .v = v.const_data_ptr(),
      .v_stride = v.stride(0),
      .rope_table = static_cast<const float*>(rope_table.const_data_ptr()),
      .positions = static_cast<const int64_t*>(positions.const_data_ptr()),
      .slots = static_cast<const int64_t*>(slots.const_data_ptr()),
      .k_pages = k_pages.mutable_data_ptr(),
      .v_pages = v_pages.mutable_data_ptr(),
  };
}

#endif

}  // namespace voxkern
