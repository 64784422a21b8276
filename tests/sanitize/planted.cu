// planted NAME: launches one small kernel. "sound" has no bug; each of the others has one bug,
// which a tool of compute-sanitizer must report before its clean report on the ops counts
// (bench/gpu_sanitize.py has the pairs).
#include <cuda_runtime.h>

#include <cstdio>
#include <map>
#include <string>

namespace {

constexpr int kThreads = 64;

// Each thread adds its neighbour's element to its own.
__global__ void sound(const int* in, int* out) {
  __shared__ int elements[kThreads];
  elements[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = elements[threadIdx.x] + elements[(threadIdx.x + 1) % kThreads];
}

// memcheck: the last thread writes past the end of the allocation.
__global__ void out_of_bounds(const int* in, int* out) { out[threadIdx.x + 1] = in[threadIdx.x]; }

// racecheck: no barrier separates the writes from other warps' reads.
__global__ void shared_race(const int* in, int* out) {
  __shared__ int elements[kThreads];
  elements[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = elements[(threadIdx.x + kThreads / 2) % kThreads];
}

// synccheck: half of each warp waits at a barrier that the other half never reaches.
__global__ void divergent_barrier(const int* in, int* out) {
  if (threadIdx.x % 32 < 16) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] += out[(threadIdx.x + 1) % kThreads];
}

// initcheck: reads the second half of the input, which was never written.
__global__ void uninitialised(const int* in, int* out) {
  out[threadIdx.x] = in[threadIdx.x + kThreads];
}

const std::map<std::string, void (*)(const int*, int*)> kKernels = {
    {"sound", sound},
    {"out of bounds", out_of_bounds},
    {"shared race", shared_race},
    {"divergent barrier", divergent_barrier},
    {"uninitialised", uninitialised},
};

int check(cudaError_t status) {
  if (status != cudaSuccess) std::puts(cudaGetErrorString(status));
  return status != cudaSuccess;
}

}  // namespace

int main(int count, char** arguments) {
  const auto found = kKernels.find(count > 1 ? arguments[1] : "");
  if (found == kKernels.end()) return 2;
  const int zeros[kThreads] = {};
  int *in = nullptr, *out = nullptr;
  if (check(cudaMalloc(&in, 2 * sizeof zeros)) || check(cudaMalloc(&out, sizeof zeros)) ||
      check(cudaMemcpy(in, zeros, sizeof zeros, cudaMemcpyHostToDevice)))
    return 1;
  found->second<<<1, kThreads>>>(in, out);
  return check(cudaGetLastError()) || check(cudaDeviceSynchronize());
}
