// What a command may write, held against what it reads.
#include "nn/outputs.hpp"

#include <doctest/doctest.h>

#include <filesystem>
#include <stdexcept>
#include <string>

#include "weights/temporary_folder.hpp"

namespace {

namespace fs = std::filesystem;
using linattn::FileSet;
using support::TemporaryFolder;
using support::write_text;

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

template <class F>
std::string error_of(const F& f) {
  try {
    f();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return {};
}

}  // namespace

TEST_CASE("file set: by name and by file") {
  const TemporaryFolder folder;
  const fs::path root = fs::canonical(folder.path());
  fs::create_directories(root / "model/vae");
  fs::create_directories(root / "elsewhere/deep");
  write_text(root / "model/config.json", "{}");
  write_text(root / "elsewhere/deep/blob", "x");
  fs::create_symlink("../elsewhere/deep/blob", root / "model/weights");
  FileSet inputs;
  inputs.add(root / "model");
  inputs.add(root / "missing.txt");
  inputs.add("/dev/null");
  inputs.add("");
  const auto conflict = [&](const fs::path& path) { return inputs.conflict(root / path); };

  for (const char* free : {"new", "elsewhere/new", "elsewhere/deep/new", "model2", "missing", "model/../new"})
    CHECK(conflict(free) == "");
  CHECK(inputs.conflict("/dev/null") == "");
  CHECK(conflict("model") == "is the input itself");
  CHECK(conflict("model/") == "is the input itself: " + (root / "model").string());
  CHECK(conflict("missing.txt") == "is the input itself");
  CHECK(has(conflict("none/../missing.txt"), "is the input itself"));
  CHECK(has(conflict("elsewhere/deep/blob"), "is the input itself: "));
  for (const char* holder : {"", "elsewhere", "elsewhere/deep"})
    CHECK(has(conflict(holder), "holds the input "));
  CHECK(conflict("model/vae/new") == "lies in the input folder " + (root / "model/vae").string());
  CHECK(has(conflict("model/none/new"), "lies in the input folder"));

  fs::create_symlink("model/created", root / "dangling");
  CHECK(has(conflict("dangling"), "lies in the input folder"));
  fs::create_symlink("model", root / "alias");
  CHECK(has(conflict("alias"), "is the input itself"));
  CHECK(has(conflict("alias/new"), "lies in the input folder"));
  fs::create_hard_link(root / "elsewhere/deep/blob", root / "hard");
  CHECK(has(conflict("hard"), "is the input itself"));
  fs::create_symlink("loop", root / "loop");
  CHECK(conflict("loop") == "");
}

TEST_CASE("outputs: the files around a model, and one output beside another") {
  const TemporaryFolder folder;
  for (const char* name : {"a.safetensors", "config.json", "b.index.json", "shard"})
    write_text(folder / name, "{}");
  FileSet inputs;
  nn::add_model(inputs, folder / "a.safetensors");
  CHECK(has(inputs.conflict(folder / "config.json"), "is the input itself"));
  CHECK(inputs.conflict(folder / "new") == "");
  nn::add_model(inputs, folder / "b.index.json");
  CHECK(has(inputs.conflict(folder / "new"), "lies in the input folder"));

  nn::Outputs outputs(FileSet{});
  outputs.add_file(folder / "x.png");
  CHECK(has(error_of([&] { outputs.add_file(folder / "x.png"); }), "x.png: is the other output itself"));
  outputs.add_file(folder / "y.png");
  CHECK(has(error_of([&] { outputs.try_file(folder / "no/such.png"); }), "such.png: "));
  CHECK(has(error_of([&] { outputs.try_file(folder.path()); }), "is a folder"));
}
