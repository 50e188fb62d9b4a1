// Turns the tracer's counts by instruction (tracer_counts.h) into counts by source line, and prints them.
// Runs addr2line.
#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdlib>
#include <cstring>

#include "emulator/tracer.h"
#include "emulator/tracer_counts.h"

namespace rebased::emulator {
namespace {

struct Location {
  std::string function = "?", file = "?";
  int line = 0;
  bool operator<(const Location& other) const {
    return std::tie(file, line) < std::tie(other.file, other.line);
  }
};

// The address, within the file of the program, of the instruction that is loaded at `pc`.
uintptr_t file_address(const void* pc) {
  Dl_info info;
  link_map* map = nullptr;
  if (!dladdr1(pc, &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP)) return 0;
  return reinterpret_cast<uintptr_t>(pc) - map->l_addr;
}

// The standard output of a program that reads a file as its standard input. The program is started without a
// shell, so that no argument can be taken for a command.
FILE* read_from(const char* const* arguments, const char* input) {
  int ends[2];
  if (pipe(ends) != 0) return nullptr;
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, input, O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  posix_spawn_file_actions_addclose(&actions, ends[0]);
  posix_spawn_file_actions_addclose(&actions, ends[1]);
  pid_t child;
  const int error =
      posix_spawnp(&child, arguments[0], &actions, nullptr, const_cast<char* const*>(arguments), environ);
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  if (error == 0) return fdopen(ends[0], "r");
  close(ends[0]);
  return nullptr;
}

// Finds the source lines of all addresses by one run of addr2line. Of the frames that are inlined at an
// address the innermost one counts that belongs to a kernel and not to a primitive of device.cuh.
std::map<uintptr_t, Location> locate(const std::vector<uintptr_t>& addresses) {
  char program[4096] = {}, list[] = "/tmp/rebased_trace_XXXXXX";
  std::map<uintptr_t, Location> found;
  const int descriptor = mkstemp(list);
  if (descriptor < 0 || readlink("/proc/self/exe", program, sizeof program - 1) < 0) return found;
  FILE* const input = fdopen(descriptor, "w");
  for (const uintptr_t address : addresses) fprintf(input, "0x%" PRIxPTR "\n", address);
  fclose(input);

  const char* const arguments[] = {"addr2line", "-a", "-i", "-f", "-C", "-e", program, nullptr};
  if (FILE* const output = read_from(arguments, list)) {
    Location* location = nullptr;
    bool primitive = false;
    char text[8192], where[8192];
    while (fgets(text, sizeof text, output)) {
      text[strcspn(text, "\n")] = 0;
      if (strncmp(text, "0x", 2) == 0) {
        location = &found[strtoull(text, nullptr, 16)];
        primitive = true;
        continue;
      }
      if (!fgets(where, sizeof where, output)) break;
      if (!primitive || !location) continue;
      where[strcspn(where, " \n")] = 0;  // file:line (discriminator 3)
      char* const colon = strrchr(where, ':');
      if (colon) *colon = 0;
      const char* const slash = strrchr(where, '/');
      *location = {text, slash ? slash + 1 : where, colon ? atoi(colon + 1) : 0};
      primitive = location->file == "device.cuh" || strstr(where, "/emulator/");
    }
    fclose(output);
    wait(nullptr);
  }
  unlink(list);
  return found;
}

struct LineKey {
  Location location;
  bool shared, write;
  bool operator<(const LineKey& other) const {
    return std::tie(location, shared, write) < std::tie(other.location, other.shared, other.write);
  }
};

struct KernelLines {
  std::string name;
  uint64_t launches;
  std::map<LineKey, AccessCounts> lines;
};

std::string short_name(std::string name) {  // void name<...>(type, ...)
  const size_t arguments = name.rfind('(');
  if (arguments != std::string::npos) name.erase(arguments);
  if (name.rfind("void ", 0) == 0) name.erase(0, 5);
  return name;
}

std::vector<KernelLines> lines_of_kernels() {
  std::vector<uintptr_t> addresses;
  const auto instruction = [](const void* pc) {
    return file_address(pc) - 1;
  };  // the hook returns to pc, just behind the access
  for (const KernelTrace& kernel : trace().kernels) {
    addresses.push_back(file_address(kernel.kernel));
    for (const auto& entry : kernel.accesses) addresses.push_back(instruction(entry.first.pc));
  }
  const std::map<uintptr_t, Location> locations = locate(addresses);
  const auto location = [&](uintptr_t address) {
    const auto found = locations.find(address);
    return found == locations.end() ? Location{} : found->second;
  };
  std::vector<KernelLines> result;
  for (const KernelTrace& kernel : trace().kernels) {
    const std::string name = short_name(location(file_address(kernel.kernel)).function);
    result.push_back({name, kernel.launches, {}});
    for (const auto& [kind, counts] : kernel.accesses) {
      result.back().lines[{location(instruction(kind.pc)), kind.shared, kind.write}].add(counts);
    }
  }
  return result;
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + '"';
}

void write_global(FILE* file, const char* prefix, const AccessCounts& counts) {
  fprintf(file, "\"%sbytes\": %" PRIu64 ", \"%ssectors\": %" PRIu64 ", \"%sideal_sectors\": %" PRIu64, prefix,
          counts.bytes, prefix, counts.sectors, prefix, counts.ideal_sectors);
}

}  // namespace

void trace_write_json(FILE* file) {
  fprintf(file, "{\n  \"kernels\": [");
  const char* separator = "\n";
  for (const KernelLines& kernel : lines_of_kernels()) {
    fprintf(file, "%s    {\"name\": %s, \"launches\": %" PRIu64 ", \"lines\": [", separator,
            quoted(kernel.name).c_str(), kernel.launches);
    separator = "\n";
    for (const auto& [key, counts] : kernel.lines) {
      fprintf(file,
              "%s      {\"file\": %s, \"line\": %d, \"memory\": \"%s\", \"access\": \"%s\", "
              "\"warp_accesses\": %" PRIu64 ", ",
              separator, quoted(key.location.file).c_str(), key.location.line,
              key.shared ? "shared" : "global", key.write ? "write" : "read", counts.warp_accesses);
      if (key.shared) {
        fprintf(file, "\"wavefronts\": %" PRIu64 ", \"ideal_wavefronts\": %" PRIu64, counts.wavefronts,
                counts.ideal_wavefronts);
      } else {
        write_global(file, "", counts);
      }
      fprintf(file, "}");
      separator = ",\n";
    }
    fprintf(file, "]}");
    separator = ",\n";
  }
  fprintf(file, "],\n  \"buffers\": [");
  separator = "\n";
  for (const BufferTrace& buffer : trace().buffers) {
    fprintf(file, "%s    {\"name\": %s, \"size\": %" PRIu64 ", ", separator, quoted(buffer.name).c_str(),
            buffer.size);
    write_global(file, "read_", buffer.read);
    fprintf(file, ", ");
    write_global(file, "written_", buffer.written);
    fprintf(file, "}");
    separator = ",\n";
  }
  fprintf(file, "]\n}\n");
}

void trace_write_text(FILE* file) {
  for (const KernelLines& kernel : lines_of_kernels()) {
    fprintf(file, "%s, %" PRIu64 " launches\n", kernel.name.c_str(), kernel.launches);
    fprintf(file, "  %-36s %-12s %12s %24s %24s\n", "line", "access", "by warps", "wavefronts (ideal)",
            "sectors (ideal)");
    for (const auto& [key, counts] : kernel.lines) {
      const std::string line = key.location.file + ":" + std::to_string(key.location.line);
      const std::string access =
          std::string(key.shared ? "shared " : "global ") + (key.write ? "write" : "read");
      fprintf(file, "  %-36s %-12s %12" PRIu64, line.c_str(), access.c_str(), counts.warp_accesses);
      if (key.shared) {
        fprintf(file, " %12" PRIu64 " (%9" PRIu64 ")\n", counts.wavefronts, counts.ideal_wavefronts);
      } else {
        fprintf(file, " %24s %12" PRIu64 " (%9" PRIu64 ")\n", "", counts.sectors, counts.ideal_sectors);
      }
    }
  }
  for (const BufferTrace& buffer : trace().buffers) {
    fprintf(file,
            "%s, %" PRIu64 " bytes: read %" PRIu64 " bytes in %" PRIu64 " sectors, wrote %" PRIu64
            " in %" PRIu64 "\n",
            buffer.name.c_str(), buffer.size, buffer.read.bytes, buffer.read.sectors, buffer.written.bytes,
            buffer.written.sectors);
  }
}

}  // namespace rebased::emulator
