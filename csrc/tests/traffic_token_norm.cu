// Counts with the tracer what the statistics of "token" LayerNorm read and write: bfloat16, 12 heads of 16,
// as a layer lays them out and head by head, 5 heads of 24, and 12 and 40 heads of 128, the latter of which
// a warp takes in parts. Writes one JSON object {"<layout> <heads> <dim>": the tracer's report, ...} to
// standard output.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda/launch/sequence.cuh"
#include "emulator/tracer.h"

namespace rebased::REBASED_BACKEND {
namespace {

constexpr int64_t tokens = 333;

const char* trace_statistics(bool packed_heads, int heads, int dim) {
  const int64_t row = static_cast<int64_t>(heads) * dim, bytes = tokens * row * 2;
  void *x = nullptr, *statistics = nullptr;  // begin at a sector, as memory of a device does
  if (posix_memalign(&x, 256, bytes) || posix_memalign(&statistics, 256, tokens * 8)) return "no memory";
  std::memset(x, 0x3c, static_cast<size_t>(bytes));
  emulator::trace_buffer("x", x, static_cast<size_t>(bytes));
  emulator::trace_buffer("statistics", statistics, tokens * 8);
  const ConstRows rows =
      packed_heads ? ConstRows{x, tokens * row, dim, row} : ConstRows{x, tokens * row, tokens * dim, dim};
  Parts<TokenRows<bfloat16_t>> parts;
  parts.add(TokenRows<bfloat16_t>(rows, heads, dim, static_cast<float*>(statistics)));
  const Grid grid(parts.part[0].blocks(tokens), 1);
  Launches launches(nullptr);
  launches.add(token_statistics<bfloat16_t>, grid, row_threads, 0, parts, tokens, tokens, dim, 1e-5);
  std::printf("\"%s %d %d\": ", packed_heads ? "packed" : "separate", heads, dim);
  emulator::trace_write_json(stdout);
  emulator::trace_reset();
  std::free(x);
  std::free(statistics);
  return launches.error();
}

}  // namespace
}  // namespace rebased::REBASED_BACKEND

int main() {
  using namespace rebased::REBASED_BACKEND;
  const struct {
    bool packed_heads;
    int heads, dim;
  } cases[] = {{true, 12, 16}, {false, 12, 16}, {false, 5, 24}, {true, 12, 128}, {true, 40, 128}};
  const char* separator = "{";
  for (const auto& [packed_heads, heads, dim] : cases) {
    std::printf("%s", separator);
    if (const char* const error = trace_statistics(packed_heads, heads, dim); *error) {
      std::fprintf(stderr, "%s\n", error);
      return 1;
    }
    separator = ",\n";
  }
  std::printf("}\n");
  return 0;
}
