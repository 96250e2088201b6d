// The program: prints the rows of each part that is linked and whose machine this is.
#include <cstdio>

#include "part.hpp"

[[gnu::weak]] int sse2(Row*);
[[gnu::weak]] int avx2(Row*);
[[gnu::weak]] int avx512(Row*);

namespace {

void show(const char* part, Part compute, bool runs) {
  if (compute == nullptr) return;
  if (!runs) {
    std::printf("skip %s: this machine lacks its instructions\n", part);
    return;
  }
  Row rows[max_rows];
  const int count = compute(rows);
  for (int i = 0; i < count; ++i)
    std::printf("%s %s: %s, workspace %zu, bits %016llx\n", part, rows[i].op,
                rows[i].failure == nullptr ? "ok" : rows[i].failure, rows[i].workspace,
                static_cast<unsigned long long>(rows[i].bits));
}

}  // namespace

int main() {
  const bool fma = __builtin_cpu_supports("fma");
  show("sse2", sse2, true);
  show("avx2", avx2, __builtin_cpu_supports("avx2") && fma);
  show("avx512", avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && fma);
}
