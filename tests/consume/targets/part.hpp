// What one part of the program computes: its ops' workspaces and a hash of their outputs' bits.
#pragma once

#include <cstddef>
#include <cstdint>

struct Row {
  const char* op;
  const char* failure;  // of the Status, or null
  std::size_t workspace;
  std::uint64_t bits;
};
inline constexpr int max_rows = 16;

// Fills `rows` and returns their number.
using Part = int (*)(Row* rows);
