// The dynamic shared memory that tensor_core_family (cuda/tensor_core/family/) and
// float32_family (cuda/float32/launch.cuh) ask for: ptxas cannot know. Lines out: bytes, kernel. The grouped
// kernels' is for 4 query heads per kv head, the float32 path's for one.
#include <cstdio>

#include "cuda/plan/float32_shape.h"
#include "cuda/tensor_core/family/backward.cuh"

namespace rebased::cuda::tensor_core {

template <class T, class S>
void print(const char* type, const char* name) {
  using Tiles = SweepTiles<T, S>;
  for (const bool grouped : {false, true}) {
    const long long reverse = Tiles::bytes(true, grouped);
    const long long forward = Tiles::bytes(false, false) + (grouped ? 4 : 1) * warps * S::affine_size * 4;
    const char* const flag = grouped ? "true" : "false";
    std::printf("%lld tensor_core::grad_kv_kernel<%s, %s, %d, %s>\n", reverse, type, name, S::feature_dim,
                flag);
    std::printf("%lld tensor_core::grad_q_kernel<%s, %s, %d, %s>\n", forward, type, name, S::feature_dim,
                flag);
  }
}

template <class T>
void print_wide(const char* type) {
  using Wide = Sweeps<T, Slabs<FeatureMap::outer, 32>>;
  std::printf("%lld tensor_core::wide_forward_kernel<%s>\n",
              static_cast<long long>(WideForwardTiles<T>::bytes), type);
  std::printf("%lld tensor_core::wide_reverse_segment_kernel<%s>\n",
              static_cast<long long>(Wide::reverse_segment_bytes), type);
  std::printf("%lld tensor_core::wide_grad_kv_kernel<%s>\n",
              static_cast<long long>(Wide::grad_kv_bytes(true)), type);
  std::printf("%lld tensor_core::wide_grad_q_kernel<%s>\n", static_cast<long long>(Wide::grad_q_bytes(4)),
              type);
}

template <FeatureMap map, int dim>
void print_types(const char* name) {
  print<bfloat16_t, Slabs<map, dim>>("bfloat16", name);
  print<half_t, Slabs<map, dim>>("float16", name);
}

template <FeatureMap map, int dim, int chunk>
void print_polynomial(const char* map_name) {
  using S = polynomial::Shape<map, dim, chunk>;
  const auto print = [&](int64_t bytes, const char* kernel, const char* more) {
    std::printf("%lld tensor_core::polynomial::%s<bfloat16, %s, %d, %d%s>\n", static_cast<long long>(bytes),
                kernel, map_name, dim, chunk, more);
  };
  print(polynomial::SegmentTiles<S>::bytes, "segment_state_kernel", "");
  print(polynomial::reverse_segment_bytes<S>(1), "reverse_segment_kernel", "");
  for (const bool grouped : {false, true}) {
    const int group_size = grouped ? 4 : 1;
    const char* const more = grouped ? ", true" : ", false";
    print(polynomial::ForwardTiles<S>::bytes(group_size), "forward_kernel", more);
    print(polynomial::GradQTiles<S>::bytes(group_size), "grad_q_kernel", more);
    print(polynomial::GradKvTiles<S>::bytes(group_size), "grad_kv_kernel", more);
  }
}
template <FeatureMap map, int dim>
void print_chunks(const char* name) {
  print_polynomial<map, dim, 64>(name);
  print_polynomial<map, dim, 128>(name);
}

}  // namespace rebased::cuda::tensor_core

void print_float32(rebased::FeatureMap map, const char* name) {
  using namespace rebased::float32_path;
  const auto print = [&](int floats, const char* kernel, const char* more = "") {
    std::printf("%d float32_path::%s<%s%s>\n", floats * 4, kernel, name, more);
  };
  print(ForwardTiles(map, 1).size, "forward_kernel");
  print(BackwardTiles(map, true, 1).size, "grad_kv_kernel");
  print(BackwardTiles(map, false, 1).size, "grad_q_kernel");
  const int backward = StateTiles<BackwardShape>(map, 1).size;
  print(StateTiles<ForwardShape>(map, 1).size, "segment_states",
        ", float32_path::ForwardShape, ForwardProblem");
  print(backward, "segment_states", ", float32_path::BackwardShape, BackwardProblem");
  print(backward, "reverse_segment_states");
}

int main() {
  using rebased::FeatureMap;
  print_float32(FeatureMap::outer, "outer");
  print_float32(FeatureMap::square, "square");
  print_float32(FeatureMap::taylor, "taylor");
  print_float32(FeatureMap::elu, "elu");
  using rebased::cuda::tensor_core::print_types;
  print_types<FeatureMap::square, 16>("square");
  print_types<FeatureMap::elu, 16>("elu");
  print_types<FeatureMap::identity, 16>("identity");
  using rebased::cuda::tensor_core::print_chunks;
  print_chunks<FeatureMap::outer, 8>("outer");
  print_chunks<FeatureMap::outer, 16>("outer");
  print_chunks<FeatureMap::taylor, 16>("taylor");
  rebased::cuda::tensor_core::print_wide<rebased::cuda::bfloat16_t>("bfloat16");
  rebased::cuda::tensor_core::print_wide<rebased::cuda::half_t>("float16");
}
