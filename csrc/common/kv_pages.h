// The arguments of attention over the paged KV cache, and checks for all ops on it.
#pragma once

#include "common/check.h"

namespace voxkern {

struct PagedAttentionParams {
  Dtype dtype;
  int64_t B, Hq, Hkv, D;
  int64_t S, M;   // page size, pages in a row of the table
  const void* q;  // [T, Hq, D]; decode_attention has T = B
  int64_t q_stride;
  const void* k_pages;        // [P, Hkv, S, D]
  const void* v_pages;        // [P, Hkv, S, D]
  const int32_t* page_table;  // [B, M]
  const int32_t* seq_lens;    // [B]
  float scale;
  void* out;  // [T, Hq, D]
};

#ifndef VOX_ISA

// Checks [T, H, D]. The heads of a token are contiguous; the stride between tokens is free, so that
// t may be a view of a fused projection.
inline void check_heads(const Tensor& t, const char* name, const Tensor& like) {
  check_device(t, name, like);
  check_dtype(t, name, like.scalar_type());
  check_dim(t, name, 3);
  check(t.numel() == 0 ||
            ((t.size(2) == 1 || t.stride(2) == 1) && (t.size(1) == 1 || t.stride(1) == t.size(2))),
        name, ": expected the last two dimensions to be contiguous");
}

// Checks k_pages and v_pages, [P, Hkv, S, D] with q's dtype and head width.
inline void check_pages(const Tensor& k_pages, const Tensor& v_pages, const Tensor& q) {
  check_operand(k_pages, "k_pages", q, q.scalar_type());
  check_shape(k_pages, "k_pages", "[P, Hkv, S, D]", {kAny, kAny, kAny, q.size(2)});
  check(k_pages.size(1) >= 1 && k_pages.size(2) >= 1, "k_pages: expected [P, Hkv, S, D], got ",
        shape_string(k_pages));
  check_operand(v_pages, "v_pages", q, q.scalar_type());
  check(shape_string(v_pages) == shape_string(k_pages), "v_pages: expected k_pages' shape ",
        shape_string(k_pages), ", got ", shape_string(v_pages));
}

// Checks that Hq is a multiple of Hkv.
inline void check_groups(const Tensor& q, const Tensor& k_pages) {
  check(q.size(1) >= 1 && q.size(1) % k_pages.size(1) == 0, "q: expected a multiple of k_pages' ",
        k_pages.size(1), " heads, got shape ", shape_string(q));
  check(q.size(2) >= 1, "q: expected a head width, got shape ", shape_string(q));
}

inline void check_page_table(const Tensor& page_table, const Tensor& seq_lens, const Tensor& q) {
  check_operand(page_table, "page_table", q, ScalarType::Int);
  check_dim(page_table, "page_table", 2);
  check_operand(seq_lens, "seq_lens", q, ScalarType::Int);
  check_shape(seq_lens, "seq_lens", "[B]", {page_table.size(0)});
}

inline PagedAttentionParams paged_attention_params(const Tensor& q, const Tensor& k_pages,
                                                   const Tensor& v_pages, const Tensor& page_table,
                                                   const Tensor& seq_lens, double scale,
                                                   const Tensor& out) {
  const Dtype dtype = float_dtype(q, "q");
  check_heads(q, "q", q);
  check_pages(k_pages, v_pages, q);
  check_groups(q, k_pages);
  check_page_table(page_table, seq_lens, q);
  return {
      .dtype = dtype,
      .B = page_table.size(0),
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

// Checks the values of positions and slots, for tensors that the host can read.
inline void check_positions_and_slots(const int64_t* positions, const int64_t* slots, int64_t T,
                                      int64_t max_positions, int64_t num_slots) {
  for (int64_t t = 0; t < T; ++t) {
    check(positions[t] >= 0 && positions[t] < max_positions, "positions: expected 0 to ",
          max_positions - 1, ", the rows of rope_table, got ", positions[t], " at index ", t);
    check(slots[t] < num_slots, "slots: expected less than ", num_slots,
          ", the slots of k_pages, got ", slots[t], " at index ", t);
  }
}

// Checks the values of seq_lens and page_table, for tensors that the host can read: every page in
// use exists.
inline void check_page_table_values(const int32_t* page_table, const int32_t* seq_lens, int64_t B,
                                    int64_t M, int64_t S, int64_t P) {
  for (int64_t b = 0; b < B; ++b) {
    check(seq_lens[b] >= 0 && seq_lens[b] <= M * S, "seq_lens: expected 0 to ", M * S,
          ", the slots of a row of page_table, got ", seq_lens[b], " at index ", b);
    for (int64_t m = 0; m * S < seq_lens[b]; ++m) {
      const int32_t page = page_table[b * M + m];
      check(page >= 0 && page < P, "page_table: expected 0 to ", P - 1,
            ", the pages of k_pages, got ", page, " at index [", b, ", ", m, "]");
    }
  }
}

#endif

}  // namespace voxkern
