#include "cuda/runtime/elements.cuh"
#include "cuda/runtime/reduce.cuh"
#include "params/prefill_attention.h"

// A row is one query of one head. Of a sequence and a key/value head, rows are numbered token by
// token and within a token by head of the group, so neighbours share keys and values. A block takes
// a tile of rows; tiles are counted on the device, since the host does not know the lengths: the
// grid has room for the most there may be. Rows know nothing of each other, and keys come in blocks
// from key 0 on: neither batch, chunks nor pages change a result.
//
// Two kernels. bfloat16 with heads of 64 or 128: a warp has 16 rows, and takes 64 or 32 keys at a
// time through the tensor cores, straight from the pages without shared memory: 16-byte loads
// already lie as the products want them if columns are taken in another order, the same for both
// operands. Scores and their sums are float32, the weights are rounded to bfloat16 for the product
// with the values (their sum is of the unrounded ones), the result once. All else: a warp has one
// row, 32 keys at a time, float32 throughout.
//
// Floor: 4 D operations a row and key: CSM's 2,048 positions 17 GFLOP a layer (without the masked
// half) and 17 us of an H100's tensor cores; prompts come a few hundred tokens at a time, and the
// products with weights cost ten times as much. So it is kept simple: K and V come from the caches,
// once a warp.
namespace voxkern {
namespace {

constexpr int kWarps = 4;
constexpr int kRowsOfWarp = 16;  // in the tensor cores' kernel
constexpr int kMaxElementwise = 256;

// This block's sequence and its first row there.
struct Tile {
  int64_t b, first_row, rows;  // rows of the sequence, for a key/value head
};

__device__ __forceinline__ bool find_tile(const PrefillAttentionParams& p, int tile_rows,
                                          Tile& tile) {
  int64_t left = blockIdx.x;
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t rows = (p.cu_seqlens[b + 1] - p.cu_seqlens[b]) * (p.Hq / p.Hkv);
    const int64_t tiles = divide_up(rows, tile_rows);
    if (left < tiles) {
      tile = {b, left * tile_rows, rows};
      return true;
    }
    left -= tiles;
  }
  return false;
}

// A row's token in q and out, its head, and the position up to which it sees keys.
struct Row {
  int64_t token, head, position;
};

__device__ __forceinline__ Row find_row(const PrefillAttentionParams& p, const Tile& tile,
                                        int64_t row) {
  const int64_t group = p.Hq / p.Hkv, at = (row < tile.rows ? row : tile.rows - 1) / group;
  const int64_t begin = p.cu_seqlens[tile.b], length = p.seq_lens[tile.b];
  const int64_t prefix = length - (p.cu_seqlens[tile.b + 1] - begin);
  return {begin + at, blockIdx.y * group + row % group, prefix + at};
}

// Where a key of the sequence is, in elements of the pages.
__device__ __forceinline__ int64_t find_key(const PrefillAttentionParams& p, int64_t b, int key) {
  const int S = static_cast<int>(p.S), page = p.page_table[b * p.M + key / S];
  return ((page * p.Hkv + blockIdx.y) * S + key % S) * p.D;
}

template <int D>
__global__ void __launch_bounds__(kWarps* kWarp, 2) tensor_kernel(PrefillAttentionParams p) {
  constexpr int kKeyBlock = D == 64 ? 64 : 32;  // as registers allow
  constexpr int kTiles = kKeyBlock / 8;         // of keys, in the scores
  wait_for_previous_kernel();
  Tile tile;
  if (!find_tile(p, kWarps * kRowsOfWarp, tile)) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int g = lane / 4, t = lane % 4;  // as in multiply_bf16
  const int64_t first = tile.first_row + warp * kRowsOfWarp;
  if (first >= tile.rows) return;  // the whole warp
  const Row rows[2] = {find_row(p, tile, first + g), find_row(p, tile, first + g + 8)};
  const int last = static_cast<int>(find_row(p, tile, first + kRowsOfWarp - 1).position);
  const int length = static_cast<int>(p.seq_lens[tile.b]);

  uint4 q[2][D / 32];
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int c = 0; c < D / 32; ++c)
      q[r][c] = *reinterpret_cast<const uint4*>(static_cast<const bf16*>(p.q) +
                                                rows[r].token * p.q_stride + rows[r].head * D +
                                                c * 32 + t * 8);

  // Columns 16 t .. 16 t + 15 of each 64, of both rows: see the store below.
  float acc[D / 64][8][4] = {};
  float largest[2], sum[2] = {};
  largest[0] = largest[1] = __uint_as_float(0xff800000u);
  for (int begin = 0; begin <= last; begin += kKeyBlock) {
    int64_t places[kKeyBlock / kWarp];  // of keys `lane` (and `lane` + 32); negative past the end
#pragma unroll
    for (int i = 0; i < kKeyBlock / kWarp; ++i) {
      const int key = begin + lane + i * kWarp;
      places[i] = key < length ? find_key(p, tile.b, key) : -1;
    }
    const auto place_of = [&](int key) {  // of the block; `key / 32` is known when compiling
      return __shfl_sync(kWholeWarp, places[key / kWarp], key % kWarp);
    };

    float scores[kTiles][4] = {};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int64_t place = place_of(j * 8 + g);
#pragma unroll
      for (int c = 0; c < D / 32; ++c) {
        uint4 k = {};
        if (place >= 0)
          k = *reinterpret_cast<const uint4*>(static_cast<const bf16*>(p.k_pages) + place + c * 32 +
                                              t * 8);
        multiply_bf16(scores[j], {q[0][c].x, q[1][c].x, q[0][c].y, q[1][c].y}, k.x, k.y);
        multiply_bf16(scores[j], {q[0][c].z, q[1][c].z, q[0][c].w, q[1][c].w}, k.z, k.w);
      }
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = largest[r];
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[j][2 * r + i];
          score = begin + j * 8 + 2 * t + i <= rows[r].position ? score * p.scale
                                                                : __uint_as_float(0xff800000u);
          top = fmaxf(top, score);
        }
      top = fmaxf(top, __shfl_xor_sync(kWholeWarp, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kWholeWarp, top, 2));
      const float factor = expf(largest[r] - top);
      largest[r] = top;
      sum[r] *= factor;
#pragma unroll
      for (int e = 0; e < D / 64; ++e)
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i) acc[e][j][2 * r + i] *= factor;
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          scores[j][2 * r + i] = expf(scores[j][2 * r + i] - top);
          sum[r] += scores[j][2 * r + i];  // of this lane's keys; the four meet at the end
        }
    }

    // 16 keys at a time: the scores' layout is that of the left operand.
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      const uint32_t weights[4] = {bf16x2_bits(scores[j][0], scores[j][1]),
                                   bf16x2_bits(scores[j][2], scores[j][3]),
                                   bf16x2_bits(scores[j + 1][0], scores[j + 1][1]),
                                   bf16x2_bits(scores[j + 1][2], scores[j + 1][3])};
      int64_t places_of_mine[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) places_of_mine[i] = place_of(j * 8 + i / 2 * 8 + 2 * t + i % 2);
#pragma unroll
      for (int e = 0; e < D / 64; ++e) {
        uint32_t v[4][4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (places_of_mine[i] < 0) continue;  // what lies there may be no number
          const uint4 words = *reinterpret_cast<const uint4*>(static_cast<const bf16*>(p.v_pages) +
                                                              places_of_mine[i] + e * 64 + g * 8);
          v[i][0] = words.x, v[i][1] = words.y, v[i][2] = words.z, v[i][3] = words.w;
        }
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const auto low = [](uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; };
          const auto high = [](uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); };
          multiply_bf16(acc[e][2 * w], weights, low(v[0][w], v[1][w]), low(v[2][w], v[3][w]));
          multiply_bf16(acc[e][2 * w + 1], weights, high(v[0][w], v[1][w]), high(v[2][w], v[3][w]));
        }
      }
    }
  }
  let_next_kernel_start();

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] += __shfl_xor_sync(kWholeWarp, sum[r], 1);
    sum[r] += __shfl_xor_sync(kWholeWarp, sum[r], 2);
    if (first + g + 8 * r >= tile.rows) continue;
    bf16* const out = static_cast<bf16*>(p.out) + (rows[r].token * p.Hq + rows[r].head) * D;
#pragma unroll
    for (int e = 0; e < D / 64; ++e)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // Product j's column n is column 8 n + j of the 64; a lane has n = 2 t and 2 t + 1.
        float values[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) values[j] = acc[e][j][2 * r + i] / sum[r];
        store<8>(out + e * 64 + (2 * t + i) * 8, values);
      }
  }
}

template <typename T>
__global__ void __launch_bounds__(kWarps* kWarp) plain_kernel(PrefillAttentionParams p) {
  constexpr int kChunks = kMaxElementwise / kWarp;
  VOX_SHARED(float[kWarps][kMaxElementwise], queries);
  VOX_SHARED(float[kWarps][kWarp], weights);
  wait_for_previous_kernel();
  Tile tile;
  if (!find_tile(p, kWarps, tile)) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, D = static_cast<int>(p.D);
  if (tile.first_row + warp >= tile.rows) return;  // the whole warp
  const Row row = find_row(p, tile, tile.first_row + warp);
  for (int i = lane; i < D; i += kWarp)
    queries[warp][i] =
        to_float(static_cast<const T*>(p.q)[row.token * p.q_stride + row.head * D + i]) * p.scale;

  float acc[kChunks] = {}, largest = __uint_as_float(0xff800000u), sum = 0;
  for (int begin = 0; begin <= row.position; begin += kWarp) {
    __syncwarp();
    const bool seen = begin + lane <= row.position;
    const int64_t place = seen ? find_key(p, tile.b, begin + lane) : 0;
    float score = __uint_as_float(0xff800000u);
    if (seen) {
      const T* const key = static_cast<const T*>(p.k_pages) + place;
      score = 0;
      for (int i = 0; i < D; ++i) score = fmaf(queries[warp][i], to_float(key[i]), score);
    }
    const float top = fmaxf(largest, warp_reduce(score, Max()));
    const float factor = expf(largest - top), weight = expf(score - top);
    largest = top;
    sum = fmaf(sum, factor, warp_reduce(weight, Add()));
    weights[warp][lane] = weight;
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) acc[c] *= factor;
    for (int j = 0; j < kWarp && begin + j <= row.position; ++j) {
      const T* const value = static_cast<const T*>(p.v_pages) + __shfl_sync(kWholeWarp, place, j);
      const float by = weights[warp][j];
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        if (c * kWarp + lane < D) acc[c] = fmaf(by, to_float(value[c * kWarp + lane]), acc[c]);
    }
  }
  let_next_kernel_start();
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
    if (c * kWarp + lane < D)
      static_cast<T*>(p.out)[(row.token * p.Hq + row.head) * D + c * kWarp + lane] =
          from_float<T>(acc[c] / sum);
}

}  // namespace

void prefill_attention(const PrefillAttentionParams& p, cudaStream_t stream) {
  if (p.T == 0 || p.B == 0) return;
  auto kernel = p.dtype == Dtype::f32 ? plain_kernel<float> : plain_kernel<bf16>;
  int tile_rows = kWarps;
  const bool vectors = is_vector_aligned<bf16>(p.q, p.q_stride) &&
                       is_vector_aligned<bf16>(p.k_pages, p.D) &&
                       is_vector_aligned<bf16>(p.v_pages, p.D);
  if (p.dtype == Dtype::bf16 && vectors && (p.D == 64 || p.D == 128)) {
    kernel = p.D == 64 ? tensor_kernel<64> : tensor_kernel<128>;
    tile_rows = kWarps * kRowsOfWarp;
  }
  const int64_t most = divide_up(p.T * (p.Hq / p.Hkv), tile_rows) + p.B;
  launch(kernel,
         {.grid = dim3(static_cast<unsigned>(most), static_cast<unsigned>(p.Hkv)),
          .block = dim3(kWarps * kWarp),
          .stream = stream},
         p);
}

}  // namespace voxkern

#ifdef VOX_HOST_PASS
namespace voxkern {
namespace {

Tensor prefill_attention_cuda(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table,
                              Tensor cu_seqlens, Tensor seq_lens, double scale) {
  check_dim(q, "q", 3);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  const PrefillAttentionParams p =
      prefill_attention_params(q, k_pages, v_pages, page_table, cu_seqlens, seq_lens, scale, out);
  check(p.D <= kMaxElementwise, "q: on CUDA expected heads of at most ", kMaxElementwise,
        " elements, got shape ", shape_string(q));
  const OnDevice device(q);
  prefill_attention(p, device.stream);
  return out;
}

}  // namespace
}  // namespace voxkern

VOX_CUDA_LIBRARY(m) { m.impl("prefill_attention", TORCH_BOX(&voxkern::prefill_attention_cuda)); }
#endif
