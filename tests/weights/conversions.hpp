// Conversions from file to file for the tests of inheritance.
#pragma once

#include <doctest/doctest.h>

#include <filesystem>

#include <linattn/weights/inherit.hpp>

#include "checkpoint_builder.hpp"

namespace support {

using linattn::Checkpoint;
using linattn::InheritOptions;
using linattn::Plan;

[[nodiscard]] inline FileStatus convert(const std::filesystem::path& from, const std::filesystem::path& to,
                                        const InheritOptions& options = {}, bool overwrite = false) {
  Checkpoint checkpoint;
  Plan plan;
  if (FileStatus status = open_checkpoint(from, checkpoint); !status.ok()) return status;
  if (FileStatus status = make_plan(checkpoint, options, plan); !status.ok()) return status;
  return apply(checkpoint, plan, options, to, overwrite);
}

// The plan for a file that is expected to fit.
[[nodiscard]] inline Plan planned(const std::filesystem::path& path, const InheritOptions& options = {}) {
  Checkpoint checkpoint;
  Plan plan;
  require_ok(open_checkpoint(path, checkpoint));
  require_ok(make_plan(checkpoint, options, plan));
  return plan;
}

}  // namespace support
