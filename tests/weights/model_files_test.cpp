#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <vector>

#include <linattn/weights/file_kind.hpp>
#include <linattn/weights/model_files.hpp>
#include <linattn/weights/recognise.hpp>
#include <linattn/weights/small_file.hpp>

#include "checkpoint_builder.hpp"

namespace {

using namespace support;
using linattn::ModelFiles;
using linattn::SmallFile;
using linattn::detail::weight_name;
using Kind = linattn::detail::WeightName::Kind;

TEST_CASE("model files: what a name says") {
  struct Case {
    const char* file;
    Kind kind;
    const char* model;
    bool standard;
  };
  for (const Case& c :
       std::vector<Case>{{"model.safetensors", Kind::file, "model", true},
                         {"model.fp16.safetensors", Kind::file, "model.fp16", true},
                         {"diffusion_pytorch_model.non_ema.safetensors", Kind::file,
                          "diffusion_pytorch_model.non_ema", true},
                         {"deit_tiny.patch16.safetensors", Kind::file, "deit_tiny.patch16", false},
                         {"model-00001-of-00002.safetensors", Kind::shard, "model", true},
                         {"model.fp16-00001-of-00002.safetensors", Kind::shard, "model.fp16", true},
                         {"model-00001-of-00002.fp16.safetensors", Kind::shard, "model.fp16", true},
                         {"model-of-2.safetensors", Kind::file, "model-of-2", false},
                         {"a-1-of-b.safetensors", Kind::file, "a-1-of-b", false},
                         {"-of-.safetensors", Kind::file, "-of-", false},
                         {"model.safetensors.index.json", Kind::index, "model", true},
                         {"model.safetensors.index.fp16.json", Kind::index, "model.fp16", true},
                         {"model.fp16.safetensors.index.json", Kind::index, "model.fp16", true},
                         {"model.safetensors.index2.json", Kind::other, "", false},
                         {"model.safetensors.index..json", Kind::other, "", false},
                         {"pytorch_model.bin.index.json", Kind::other, "", false},
                         {".model.safetensors", Kind::other, "", false},
                         {"model.safetensors.part", Kind::other, "", false},
                         {"config.json", Kind::other, "", false}}) {
    CAPTURE(c.file);
    CHECK(weight_name(c.file).kind == c.kind);
    CHECK(weight_name(c.file).model == c.model);
    CHECK(ModelFiles::is_standard(c.file) == c.standard);
  }
}

TEST_CASE("model files: the file of a folder") {
  TemporaryFolder folder;
  const auto chosen = [&](const std::vector<std::string>& files) {
    for (const std::string& name : folder.names()) std::filesystem::remove_all(folder / name);
    for (const std::string& name : files)
      write_text(folder / name, name.find(".index") == std::string::npos
                                    ? ""
                                    : R"({"weight_map": {"a": "shard-a.safetensors"}})");
    ModelFiles all;
    REQUIRE(ModelFiles::list(folder.path(), all).ok());
    std::filesystem::path file;
    std::string note;
    const FileStatus status = all.choose(file, note);
    return status.ok() ? file.filename().string() + (note.empty() ? "" : " !") : message(status);
  };
  CHECK(chosen({"model.safetensors", "model.fp16.safetensors"}) == "model.safetensors");
  CHECK(chosen({"model.safetensors", "diffusion_pytorch_model.safetensors"}) ==
        "diffusion_pytorch_model.safetensors");
  CHECK(chosen({"model.fp16.safetensors", "lora.safetensors"}) == "model.fp16.safetensors !");
  CHECK(chosen({"deit.safetensors", "config.json"}) == "deit.safetensors");
  CHECK(chosen({"x.safetensors.index.json", "shard-a.safetensors"}) == "x.safetensors.index.json");
  CHECK(chosen({"model-00001-of-00001.safetensors"}) == "model-00001-of-00001.safetensors");
  CHECK(chosen({"model.safetensors", "model-00001-of-00002.safetensors"}) == "model.safetensors !");
  CHECK(chosen({"model.safetensors.index.json", "shard-a.safetensors", "model-00001-of-00002.safetensors"}) ==
        "model.safetensors.index.json !");
  CHECK(contains(chosen({"a.safetensors", "b.safetensors"}), "holds 2 models: name one (a.safetensors, b."));
  CHECK(contains(chosen({"x.safetensors.index.json", "shard-a.safetensors", "b.safetensors"}),
                 "holds 2 models"));
  CHECK(contains(chosen({"model.safetensors.index.json", "shard-a.safetensors", "model.safetensors"}),
                 "does not list it: remove the one"));
  CHECK(
      contains(chosen({"model.safetensors.index.json"}), "lists 'shard-a.safetensors', which is not there"));
  CHECK(contains(chosen({"model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"}),
                 "holds two indices of one model"));
  CHECK(contains(chosen({"model-00001-of-00002.safetensors"}), "no index that lists it"));
  CHECK(contains(chosen({"config.json"}), "holds no safetensors file"));
  CHECK(contains(chosen({"pytorch_model.bin"}), "but pytorch_model.bin: load it in PyTorch"));
}

TEST_CASE("small files: a regular file within the limit, or the pipe of a shell") {
  TemporaryFolder folder;
  std::string content;
  const auto read = [&](const std::filesystem::path& path, SmallFile takes = SmallFile::regular) {
    return message(linattn::read_small_file(path, 8, "a list", content, takes));
  };
  write_text(folder / "eight", "12345678");
  CHECK(read(folder / "eight") == "ok");
  CHECK(content == "12345678");
  write_text(folder / "nine", "123456789");
  CHECK(contains(read(folder / "nine"), "has 9 bytes, but a list has at most 8"));
  CHECK(contains(read(folder.path()), "is a folder, not a regular file"));
  CHECK(contains(read(folder / "none"), "No such file"));
  std::filesystem::create_symlink("nowhere", folder / "link");
  CHECK(contains(read(folder / "link"), "is a link to 'nowhere', where there is no file"));
  REQUIRE(::mkfifo((folder / "fifo").c_str(), 0600) == 0);
  for (const SmallFile takes : {SmallFile::regular, SmallFile::or_unnamed_pipe})
    CHECK(contains(read(folder / "fifo", takes), "is a pipe, not a regular file"));
  for (const char* text : {"12345678", "123456789"}) {
    int ends[2];
    REQUIRE(::pipe(ends) == 0);
    REQUIRE(::write(ends[1], text, std::string(text).size()) > 0);
    ::close(ends[1]);
    const std::string path = "/dev/fd/" + std::to_string(ends[0]);
    CHECK(contains(read(path), "is a pipe, not a regular file"));
    const std::string said = read(path, SmallFile::or_unnamed_pipe);
    CHECK((std::string(text).size() == 8 ? said == "ok" && content == text : contains(said, "at most 8")));
    ::close(ends[0]);
  }
}

TEST_CASE("wrappers of names are seen through") {
  CHECK(linattn::without_wrappers("module._orig_mod.") == "");
  CHECK(linattn::without_wrappers("model.module.diffusion_model._orig_mod.") == "model.diffusion_model.");
  CHECK(linattn::without_wrappers("module.blocks.0._orig_mod.attn") == "blocks.0.attn");
  CHECK(linattn::without_wrappers("submodule.module") == "submodule.module");
}

}  // namespace
