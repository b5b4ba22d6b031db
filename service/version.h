// The version of this build, from the project's CMakeLists.txt.
#pragma once

namespace kvshrink::service {

inline constexpr char kVersion[] = KVSHRINK_VERSION;

}  // namespace kvshrink::service
