// The dynamic shared memory that launch_backward (cuda/tensor_core_backward.cuh) asks for: ptxas cannot know.
// Lines out: bytes, kernel. Of kernels for several query heads per kv head it is for 4.
#include <cstdio>

#include "cuda/tensor_core_backward.cuh"

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

}  // namespace rebased::cuda::tensor_core

int main() {
  using rebased::FeatureMap;
  using rebased::cuda::tensor_core::print_types;
  print_types<FeatureMap::outer, 8>("outer");
  print_types<FeatureMap::outer, 16>("outer");
  print_types<FeatureMap::square, 16>("square");
  print_types<FeatureMap::taylor, 16>("taylor");
  print_types<FeatureMap::elu, 16>("elu");
  rebased::cuda::tensor_core::print_wide<rebased::cuda::bfloat16_t>("bfloat16");
  rebased::cuda::tensor_core::print_wide<rebased::cuda::half_t>("float16");
}
