// The parameters of the tensor-core forward kernel, made by the launcher's own code for addresses and sizes
// that test_ptx.py gives: so the test need not know how the structs lie in memory. In: the chunk length of a
// kernel for whole rows or 0, dtype, feature map, LayerNorm, heads, kv_heads, seqlen, head_dim, scale, eps,
// layer_norm_eps, then the addresses of q, k, v (contiguous), query gamma, query beta, key gamma, key beta (of
// each head), y, r, final kv, final k. Out: the grid's x and y, threads, bytes of dynamic shared memory, then
// the parameters' bytes in hexadecimal.
#include <cstdio>
#include <iostream>

#include "cuda/tensor_core/family/launch.cuh"

namespace {

using namespace rebased;

constexpr int64_t feature_dim = 16;

template <class Pointer>
RowsOf<Pointer> rows(uint64_t address, int64_t heads, int64_t seqlen, int64_t width) {
  return {reinterpret_cast<Pointer>(address), heads * seqlen * width, seqlen * width, width};
}

Affine affine(uint64_t gamma, uint64_t beta) {
  return {reinterpret_cast<const void*>(gamma), reinterpret_cast<const void*>(beta), feature_dim,
          feature_dim};
}

}  // namespace

int main() {
  ForwardProblem problem{};
  int chunk, dtype, feature_map, layer_norm;
  uint64_t q, k, v, query_gamma, query_beta, key_gamma, key_beta, y, r, final_kv, final_k;
  std::cin >> chunk >> dtype >> feature_map >> layer_norm >> problem.heads >> problem.kv_heads >>
      problem.seqlen >> problem.head_dim >> problem.scale >> problem.eps >> problem.layer_norm_eps >> q >>
      k >> v >> query_gamma >> query_beta >> key_gamma >> key_beta >> y >> r >> final_kv >> final_k;
  if (!std::cin) return 1;
  problem.batch = problem.num_sequences = 1;
  problem.feature_dim = feature_dim;
  problem.dtype = static_cast<Dtype>(dtype);
  problem.feature_map = static_cast<FeatureMap>(feature_map);
  problem.layer_norm = static_cast<LayerNorm>(layer_norm);
  problem.normalize = true;
  problem.q = rows<const void*>(q, problem.heads, problem.seqlen, problem.feature_dim);
  problem.k = rows<const void*>(k, problem.kv_heads, problem.seqlen, problem.feature_dim);
  problem.v = rows<const void*>(v, problem.kv_heads, problem.seqlen, problem.head_dim);
  problem.y = rows<void*>(y, problem.heads, problem.seqlen, problem.head_dim);
  problem.query_affine = affine(query_gamma, query_beta);
  problem.key_affine = affine(key_gamma, key_beta);
  problem.r = reinterpret_cast<void*>(r);
  problem.final_state = {reinterpret_cast<void*>(final_kv), reinterpret_cast<void*>(final_k)};

  const Plan plan;
  const cuda::tensor_core::Arguments<ForwardProblem> arguments(cuda::make_call(problem, plan), nullptr,
                                                               false);
  const cuda::Grid grid = cuda::tensor_core::sweep_grid(problem, plan.segments);
  const int64_t bytes_of_tiles =
      chunk && is_polynomial(problem.feature_map)
          ? tensor_core::polynomial_forward_bytes(problem.feature_map, feature_dim, chunk, 1)
          : 0;
  std::printf("%d %d %d %d ", static_cast<int>(grid.x), static_cast<int>(grid.y), cuda::tensor_core::threads,
              static_cast<int>(bytes_of_tiles));
  const auto* bytes = reinterpret_cast<const unsigned char*>(&arguments);
  for (size_t i = 0; i < sizeof arguments; ++i) std::printf("%02x", bytes[i]);
  std::printf("\n");
}
