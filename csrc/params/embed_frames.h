// embed_frames: for each frame, the sum of the audio rows and the text row whose mask is set.
#pragma once

#include "common/check.h"

namespace voxkern {

struct EmbedFramesParams {
  Dtype dtype;
  int64_t T, K, V, C, text_rows;
  const int64_t* frames;    // [T, K + 1]
  const bool* mask;         // [T, K + 1]
  const void* audio_table;  // [K * V, C]
  const void* text_table;   // [text_rows, C]
  void* out;                // [T, C]
};

#ifndef VOX_ISA

inline EmbedFramesParams embed_frames_params(const Tensor& frames, const Tensor& mask,
                                             const Tensor& audio_table, const Tensor& text_table,
                                             const Tensor& out) {
  check_operand(frames, "frames", frames, ScalarType::Long);
  check_dim(frames, "frames", 2);
  const int64_t T = frames.size(0), K = frames.size(1) - 1;
  check(K >= 1, "frames: expected shape [T, K + 1] with K >= 1, got ", shape_string(frames));
  check_operand(mask, "mask", frames, ScalarType::Bool);
  check_shape(mask, "mask", "[T, K + 1]", {T, K + 1});
  const Dtype dtype = float_dtype(audio_table, "audio_table");
  check_operand(audio_table, "audio_table", frames, audio_table.scalar_type());
  check_dim(audio_table, "audio_table", 2);
  check(audio_table.size(0) % K == 0, "audio_table: expected [K * V, C] with K = ", K, ", got ",
        shape_string(audio_table));
  check_operand(text_table, "text_table", frames, audio_table.scalar_type());
  check_shape(text_table, "text_table", "[text vocabulary, C]", {kAny, audio_table.size(1)});
  return {
      .dtype = dtype,
      .T = T,
      .K = K,
      .V = audio_table.size(0) / K,
      .C = audio_table.size(1),
      .text_rows = text_table.size(0),
      .frames = static_cast<const int64_t*>(frames.const_data_ptr()),
      .mask = static_cast<const bool*>(mask.const_data_ptr()),
      .audio_table = audio_table.const_data_ptr(),
      .text_table = text_table.const_data_ptr(),
      .out = out.mutable_data_ptr(),
  };
}

#endif

}  // namespace voxkern
