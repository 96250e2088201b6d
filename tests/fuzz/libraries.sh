#!/usr/bin/env bash
# libraries.sh BUILD: builds SentencePiece, libpng and libjpeg-turbo from Debian's sources under ASan and UBSan and with
# libFuzzer's coverage, to BUILD/libraries, where run.py has the targets load them in place of the system's. Minutes.
set -euo pipefail
[ -f "${1:?BUILD folder}/build.ninja" ] || { echo "not a build folder: $1" >&2; exit 2; }
out=$(realpath "$1")/libraries
rm -rf "$out"
mkdir -p "$out/apt/lists/partial" "$out/apt/cache/archives/partial" "$out/sources"

# The system's own lists, as sources; its configuration is left alone.
lists=/etc/apt/sources.list
[ ! -f $lists ] || sed -n 's/^deb /deb-src /p' $lists >"$out/apt/debian.list"
[ ! -f $lists.d/debian.sources ] || sed 's/^Types:.*/Types: deb-src/' $lists.d/debian.sources >"$out/apt/debian.sources"
get() {
  apt-get -qq -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$out/apt" -o Dir::State::Lists="$out/apt/lists" \
    -o Dir::Cache="$out/apt/cache" -o APT::Sandbox::User="$(id -un)" "$@"
}
get update
for package in sentencepiece libpng1.6 libjpeg-turbo; do
  # Not every mirror has the sources of the security updates.
  (cd "$out/sources" && { get source "$package" || get source "$package/$(. /etc/os-release && echo "$VERSION_CODENAME")"; })
done

# build NAME TARGET [OPTION...]: the shared library, under the name that the system's has. The checks are those of ./dev fuzz;
# assembler is left out, because no sanitizer sees it.
flags='-O1 -g1 -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all -fno-sanitize=null,alignment,object-size,vptr'
build() {
  local tree
  tree=$(echo "$out/sources/$1"-*/)
  CC=clang CXX=clang++ cmake -G Ninja -S "$tree" -B "$tree/fuzz" -DCMAKE_BUILD_TYPE=None \
    -DCMAKE_C_FLAGS="$flags" -DCMAKE_CXX_FLAGS="$flags" "${@:3}" >/dev/null
  ninja -C "$tree/fuzz" "$2"
  find "$tree/fuzz" -name 'lib*.so.?' -o -name 'lib*.so.??' | xargs cp -Lt "$out"
}
build libpng1.6 png -DPNG_HARDWARE_OPTIMIZATIONS=OFF
build libjpeg-turbo jpeg -DWITH_SIMD=OFF
build sentencepiece sentencepiece -DSPM_ENABLE_TCMALLOC=OFF
ls "$out"/*.so.*
