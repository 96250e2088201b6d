// golden PATH... [--ops a,b]: runs recorded cases (safetensors files, or folders of them) by their `op`.
//
// A line a tensor, then "N passed, N failed" where N counts cases. Exit code 0 when all passed, 1 when one failed
// (a difference, an unknown op, an unknown or a missing tensor, a file that cannot be read) or none was run, 2 for a
// wrong command.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "golden.hpp"

namespace {

constexpr const char* usage =
    "usage: golden PATH... [--ops a,b]\n"
    "  PATH       a safetensors file with a recorded case, or a folder of them\n"
    "  --ops a,b  run these ops only; without it every case must have a known op\n"
    "example: golden ../shared/goldens/ttt --ops softmax_attention,ttt_swiglu_ip\n";

struct Arguments {
  std::vector<std::filesystem::path> paths;
  std::set<std::string, std::less<>> ops;
  bool help = false;
  std::string error;
};

Arguments parse(int count, char** values) {
  Arguments arguments;
  for (int i = 1; i < count; ++i) {
    std::string_view value = values[i];
    if (value == "--help" || value == "-h") {
      arguments.help = true;
    } else if (value == "--ops" || value.starts_with("--ops=")) {
      if (value == "--ops" && ++i == count) {
        arguments.error = "--ops needs a list";
        return arguments;
      }
      std::string_view list = value == "--ops" ? std::string_view(values[i]) : value.substr(6);
      while (!list.empty()) {
        const std::size_t comma = std::min(list.find(','), list.size());
        const std::string op(list.substr(0, comma));
        if (!golden::registry().contains(op)) {
          arguments.error = "--ops: unknown op '" + op + "'";
          return arguments;
        }
        arguments.ops.insert(op);
        list.remove_prefix(std::min(comma + 1, list.size()));
      }
      if (arguments.ops.empty()) arguments.error = "--ops needs a list";
    } else if (value.starts_with("-")) {
      arguments.error = "unknown option '" + std::string(value) + "'";
    } else {
      arguments.paths.emplace_back(value);
    }
  }
  if (arguments.error.empty() && arguments.paths.empty()) arguments.error = "no path was given";
  return arguments;
}

// The case files under a path, sorted. A file is taken whatever its name.
std::vector<std::filesystem::path> files_of(const std::filesystem::path& path) {
  if (!std::filesystem::is_directory(path)) return {path};
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(path))
    if (entry.is_regular_file() && entry.path().extension() == ".safetensors") files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  return files;
}

enum class Outcome { passed, failed, skipped };

Outcome run(const std::filesystem::path& path, const Arguments& arguments) {
  try {
    golden::Case c(path);
    const std::string op = c.op();
    if (!arguments.ops.empty() && !arguments.ops.contains(op)) return Outcome::skipped;
    std::printf("%s (%s)\n", path.filename().c_str(), op.c_str());
    const auto runner = golden::registry().find(op);
    if (runner == golden::registry().end()) {
      std::printf("  FAIL unknown op '%s'\n", op.c_str());
      return Outcome::failed;
    }
    bool complete = true;
    try {
      runner->second(c);
    } catch (const std::exception& error) {
      std::printf("  FAIL %s\n", error.what());
      complete = false;
    }
    return c.finish(complete) ? Outcome::passed : Outcome::failed;
  } catch (const std::exception& error) {
    std::printf("%s\n  FAIL %s\n", path.filename().c_str(), error.what());
    return Outcome::failed;
  }
}

}  // namespace

int main(int count, char** values) {
  const Arguments arguments = parse(count, values);
  if (arguments.help) {
    std::fputs(usage, stdout);
    return 0;
  }
  if (!arguments.error.empty()) {
    std::fprintf(stderr, "golden: %s\n%s", arguments.error.c_str(), usage);
    return 2;
  }
  int passed = 0, failed = 0, skipped = 0;
  for (const std::filesystem::path& path : arguments.paths) {
    std::vector<std::filesystem::path> files;
    try {
      files = files_of(path);
    } catch (const std::exception& error) {
      std::printf("FAIL %s\n", error.what());
    }
    if (files.empty()) {
      std::printf("%s\n  FAIL no case was found\n", path.c_str());
      ++failed;
    }
    for (const std::filesystem::path& file : files) {
      const Outcome outcome = run(file, arguments);
      passed += outcome == Outcome::passed;
      failed += outcome == Outcome::failed;
      skipped += outcome == Outcome::skipped;
    }
  }
  if (skipped > 0) std::printf("%d cases of other ops skipped\n", skipped);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}
