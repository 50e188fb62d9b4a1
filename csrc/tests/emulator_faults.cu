// Runs the kernel of emulator_faults.cuh with one fault planted, or a launch that breaks a limit.
//   emulator_faults            lists the faults
//   emulator_faults FAULT      prints "right", "wrong: ..." or "error: ...", or is ended by a sanitizer
#include "tests/emulator_faults.cuh"

#include <cstdio>
#include <string>
#include <vector>

namespace rebased::REBASED_BACKEND {
namespace {

constexpr int blocks = 4, rows = 3 * chunk;

using Kernel = void (*)(const float*, const float*, float*, float*, int);
struct Planted {
  const char* name;
  Kernel kernel;
};
#define PLANTED(fault) {#fault, row_sums<Fault::fault>}
const Planted all_planted[] = {
    PLANTED(none),
    PLANTED(missing_block_barrier),
    PLANTED(missing_barrier_before_write),
    PLANTED(missing_warp_barrier),
    PLANTED(missing_copy_wait),
    PLANTED(early_copy),
    PLANTED(forgotten_copy),
    PLANTED(uninitialised_shared),
    PLANTED(write_past_shared),
    PLANTED(read_past_global),
    PLANTED(copy_past_global),
    PLANTED(divergent_barrier),
    PLANTED(early_return),
    PLANTED(divergent_shuffle),
    PLANTED(different_shuffles),
    PLANTED(shuffle_outside_mask),
    PLANTED(racing_blocks),
    PLANTED(misaligned_vector),
    PLANTED(misaligned_pointer),
    PLANTED(misaligned_matrix_row),
    PLANTED(matrix_row_in_global),
    PLANTED(shared_as_global),
    PLANTED(failed_assertion),
    PLANTED(thrown_exception),
};
#undef PLANTED

KERNEL void too_much_static_memory(float* y) {
  SHARED_MEMORY(float, first, 8000);
  SHARED_MEMORY(float, second, 8000);
  y[0] = first[0] + second[0];
}

struct Data {
  std::vector<float> q, k, y, totals;
  Data() : q(blocks * rows * width), k(q.size()), y(blocks * rows, -2), totals(blocks * width, 0) {
    for (size_t i = 0; i < q.size(); ++i) {
      q[i] = static_cast<float>(static_cast<int>(i * 7 % 5) - 2);
      k[i] = static_cast<float>(static_cast<int>(i * 11 % 7) - 3);
    }
  }
};

// How many values differ from those that the kernel should give.
int count_wrong(const Data& data, bool with_totals) {
  int wrong = 0;
  for (int block = 0; block < blocks; ++block) {
    const float* const q = &data.q[block * rows * width];
    const float* const k = &data.k[block * rows * width];
    std::vector<float> z(width, 0.0f);
    for (int i = 0; i < rows; ++i) {
      if (i % chunk == 0) {
        for (int j = i; j < i + chunk; ++j) {
          for (int x = 0; x < width; ++x) z[x] += k[j * width + x];
        }
      }
      float sum = 0;
      for (int x = 0; x < width; ++x) sum += q[i * width + x] * z[x];
      wrong += !(data.y[block * rows + i] == sum);
    }
    for (int x = 0; with_totals && x < width; ++x) wrong += !(data.totals[block * width + x] == z[x]);
  }
  return wrong;
}

const char* launch_fault(const std::string& name, Data& data) {
  const auto good = [&](dim3 grid, dim3 block, size_t bytes) {
    return LAUNCH(row_sums<Fault::none>, grid, block, bytes, nullptr, data.q.data(), data.k.data(),
                  data.y.data(), data.totals.data(), rows);
  };
  if (name == "too_much_dynamic_memory") return good(blocks, threads, (227 << 10) + 16);
  if (name == "much_dynamic_memory") return good(blocks, threads, 140 << 10);
  if (name == "too_much_static_memory")
    return LAUNCH(too_much_static_memory, 1, 32, 0, nullptr, data.y.data());
  if (name == "too_many_threads") return good(blocks, 1056, dynamic_bytes);
  if (name == "too_large_grid") return good(dim3(1, 65536), threads, dynamic_bytes);
  if (name == "empty_grid") return good(0, threads, dynamic_bytes);
  for (const Planted& planted : all_planted) {
    if (name == planted.name) {
      return LAUNCH(planted.kernel, blocks, threads, dynamic_bytes, nullptr, data.q.data(), data.k.data(),
                    data.y.data(), data.totals.data(), rows);
    }
  }
  return "no such fault";
}

void run(const std::string& name) {
  Data data;
  const char* const error = launch_fault(name, data);
  const int wrong = *error ? 0 : count_wrong(data, name != "racing_blocks");
  if (*error) {
    printf("error: %s\n", error);
  } else if (wrong) {
    printf("wrong: %d values\n", wrong);
  } else {
    printf("right\n");
  }
  // whatever became of a launch, the next launch must work
  Data fresh;
  if (*launch_fault("none", fresh) || count_wrong(fresh, true)) printf("and the launch after it failed\n");
}

}  // namespace
}  // namespace rebased::REBASED_BACKEND

int main(int count, char** arguments) {
  using namespace rebased::REBASED_BACKEND;
  if (count == 2) {
    run(arguments[1]);
    return 0;
  }
  for (const Planted& planted : all_planted) printf("%s\n", planted.name);
  return 0;
}
