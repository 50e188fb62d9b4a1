// The dynamic shared memory that launch_backward (cuda/tensor_core_backward.cuh) asks for: ptxas cannot know.
// Lines out: bytes, kernel. The grouped kernels' is for 4 query heads per kv head.
#include <cstdio>

#include "cuda/tensor_core_backward.cuh"

namespace rebased::cuda::tensor_core {

template <class T, FeatureMap map>
void print(const char* type, const char* name) {
  using Tiles = SweepTiles<T, map>;
  for (const bool grouped : {false, true}) {
    const long long reverse = Tiles::bytes(true, grouped);
    const long long forward = Tiles::bytes(false, false) + (grouped ? 4 : 1) * warps * affine_size * 4;
    const char* const flag = grouped ? "true" : "false";
    std::printf("%lld tensor_core::grad_kv_kernel<%s, %s, %s>\n", reverse, type, name, flag);
    std::printf("%lld tensor_core::grad_q_kernel<%s, %s, %s>\n", forward, type, name, flag);
  }
}

template <FeatureMap map>
void print_types(const char* name) {
  print<bfloat16_t, map>("bfloat16", name);
  print<half_t, map>("float16", name);
}

}  // namespace rebased::cuda::tensor_core

int main() {
  using rebased::FeatureMap;
  rebased::cuda::tensor_core::print_types<FeatureMap::outer>("outer");
  rebased::cuda::tensor_core::print_types<FeatureMap::square>("square");
  rebased::cuda::tensor_core::print_types<FeatureMap::taylor>("taylor");
  rebased::cuda::tensor_core::print_types<FeatureMap::elu>("elu");
}
