# Debian packages, for the scripts that install what is missing. To be sourced by bash.
# shellcheck shell=bash

KVSHRINK_BUILD_PACKAGES=(
  ccache cmake g++ ninja-build pkg-config
  libabsl-dev libcli11-dev libeigen3-dev libgrpc++-dev libgrpc-dev libhwy-dev libprotobuf-dev libspdlog-dev
  libssl-dev libxxhash-dev librocksdb-dev nlohmann-json3-dev prometheus-cpp-dev protobuf-compiler protobuf-compiler-grpc
)
KVSHRINK_TEST_PACKAGES=(
  clang-14 clang-format clang-tidy git libbenchmark-dev libclang-rt-14-dev libgmock-dev libgtest-dev python3-venv shellcheck
)

# Names of the packages among the arguments that aren't installed, one a line.
missing_packages() {
  local name
  for name in "$@"; do
    # `|| true`: dpkg-query fails for a package that it has never heard of.
    if [[ "$(dpkg-query --show --showformat='${db:Status-Status}' "$name" 2>/dev/null || true)" != installed ]]; then
      echo "$name"
    fi
  done
}

# Installs those of the arguments that are missing; asks apt nothing when none is.
install_packages() {
  local -a missing root=()
  mapfile -t missing < <(missing_packages "$@")
  if [[ ${#missing[@]} -eq 0 ]]; then
    return 0
  fi
  if ! command -v apt-get >/dev/null; then
    echo "This machine has no apt-get. Please install what these Debian packages hold: ${missing[*]}" >&2
    return 1
  fi
  if [[ "$(id -u)" -ne 0 ]]; then
    root=(sudo)
  fi
  echo "Installing ${#missing[@]} packages: ${missing[*]}"
  "${root[@]}" apt-get update -q
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
}

install_build_packages() { install_packages "${KVSHRINK_BUILD_PACKAGES[@]}"; }
install_test_packages() { install_packages "${KVSHRINK_BUILD_PACKAGES[@]}" "${KVSHRINK_TEST_PACKAGES[@]}"; }
