// Checks that the ops on the paged KV cache share; host side only.
#pragma once

#include "check.h"

namespace voxkern {

// [T, H, D], each token's heads contiguous; tokens may be further apart (a view of one projection).
inline void check_heads(const Tensor& t, const char* name, const Tensor& like) {
  check_device(t, name, like);
  check_dtype(t, name, like.scalar_type());
  check_dim(t, name, 3);
  check(t.numel() == 0 ||
            ((t.size(2) == 1 || t.stride(2) == 1) && (t.size(1) == 1 || t.stride(1) == t.size(2))),
        name, ": expected the last two dimensions to be contiguous");
}

// k_pages and v_pages, [P, Hkv, S, D] for heads like q's.
inline void check_pages(const Tensor& k_pages, const Tensor& v_pages, const Tensor& q) {
  check_operand(k_pages, "k_pages", q, q.scalar_type());
  check_shape(k_pages, "k_pages", "[P, Hkv, S, D]", {kAny, kAny, kAny, q.size(2)});
  check(k_pages.size(1) >= 1 && k_pages.size(2) >= 1, "k_pages: expected [P, Hkv, S, D], got ",
        shape_string(k_pages));
  check_operand(v_pages, "v_pages", q, q.scalar_type());
  check(shape_string(v_pages) == shape_string(k_pages), "v_pages: expected k_pages' shape ",
        shape_string(k_pages), ", got ", shape_string(v_pages));
}

}  // namespace voxkern
