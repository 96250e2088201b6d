// golden PATH... [--ops a,b] [--context cpu|cuda]: runs recorded cases (safetensors files, or folders of them) by
// their `op`.
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
    "usage: golden PATH... [--ops a,b] [--context cpu|cuda]\n"
    "  PATH       a safetensors file with a recorded case, or a folder of them\n"
    "  --ops a,b  run these ops only; without it every case must have a known op\n"
    "  --context  where the ops run, cpu without it; cases of ops that cuda does not have are listed and "
    "skipped\n"
    "example: golden ../shared/goldens/ttt --ops softmax_attention,ttt_swiglu_ip\n";

struct Arguments {
  std::vector<std::filesystem::path> paths;
  std::set<std::string, std::less<>> ops;
  std::string context = "cpu";
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
        arguments.ops.insert(op);
        list.remove_prefix(std::min(comma + 1, list.size()));
      }
      if (arguments.ops.empty()) arguments.error = "--ops needs a list";
    } else if (value == "--context" || value.starts_with("--context=")) {
      if (value == "--context" && ++i == count) {
        arguments.error = "--context needs cpu or cuda";
        return arguments;
      }
      arguments.context = value == "--context" ? values[i] : value.substr(10);
      if (arguments.context != "cpu" && arguments.context != "cuda")
        arguments.error = "--context: neither cpu nor cuda: '" + arguments.context + "'";
    } else if (value.starts_with("-")) {
      arguments.error = "unknown option '" + std::string(value) + "'";
    } else {
      arguments.paths.emplace_back(value);
    }
  }
  for (const std::string& op : arguments.ops)
    if (arguments.error.empty() && !golden::registry(arguments.context).contains(op))
      arguments.error =
          "--ops: " + std::string(golden::registry("cpu").contains(op) ? "not on cuda" : "unknown op") +
          ": '" + op + "'";
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

enum class Outcome { passed, failed, skipped, elsewhere };

Outcome run(const std::filesystem::path& path, const Arguments& arguments) {
  try {
    golden::Case c(path);
    const std::string op = c.op();
    if (!arguments.ops.empty() && !arguments.ops.contains(op)) return Outcome::skipped;
    std::printf("%s (%s)\n", path.filename().c_str(), op.c_str());
    const auto& runners = golden::registry(arguments.context);
    const auto runner = runners.find(op);
    if (runner == runners.end() && golden::registry("cpu").contains(op)) {
      std::printf("  not on %s\n", arguments.context.c_str());
      return Outcome::elsewhere;
    }
    if (runner == runners.end()) {
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
  int passed = 0, failed = 0, skipped = 0, elsewhere = 0;
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
      elsewhere += outcome == Outcome::elsewhere;
    }
  }
  if (skipped > 0) std::printf("%d cases of other ops skipped\n", skipped);
  if (elsewhere > 0) std::printf("%d cases not on %s skipped\n", elsewhere, arguments.context.c_str());
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}
