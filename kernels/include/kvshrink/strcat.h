// absl::StrCat for std::string_view too: where Abseil was built for C++14, as Debian's is, its own
// string_view is another type.
#pragma once

#include <string>
#include <string_view>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace kvshrink {

template <typename Piece>
decltype(auto) ToAbslPiece(const Piece& piece) {
  if constexpr (std::is_same_v<Piece, std::string_view>) {
    return absl::string_view(piece.data(), piece.size());
  } else {
    return (piece);
  }
}

template <typename... Pieces>
std::string StrCat(const Pieces&... pieces) {
  return absl::StrCat(ToAbslPiece(pieces)...);
}

}  // namespace kvshrink
