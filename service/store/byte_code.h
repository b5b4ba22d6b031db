// Integers in the byte strings that the store keeps: big-endian in keys, so that they sort,
// little-endian in records.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace kvshrink::store {

template <typename Int>
void AppendBigEndian(std::string* out, Int value) {
  for (size_t i = sizeof(Int); i-- > 0;) out->push_back(static_cast<char>(value >> (8 * i)));
}

template <typename Int>
void AppendLittleEndian(std::string* out, Int value) {
  for (size_t i = 0; i < sizeof(Int); ++i) out->push_back(static_cast<char>(value >> (8 * i)));
}

// Takes an integer off the front of `in`; false, with `in` as it was, when it is too short.
template <typename Int>
bool TakeBigEndian(std::string_view* in, Int* value) {
  if (in->size() < sizeof(Int)) return false;
  uint64_t sum = 0;
  for (size_t i = 0; i < sizeof(Int); ++i) sum = sum << 8 | static_cast<uint8_t>((*in)[i]);
  *value = static_cast<Int>(sum);
  in->remove_prefix(sizeof(Int));
  return true;
}

template <typename Int>
bool TakeLittleEndian(std::string_view* in, Int* value) {
  if (in->size() < sizeof(Int)) return false;
  uint64_t sum = 0;
  for (size_t i = sizeof(Int); i-- > 0;) sum = sum << 8 | static_cast<uint8_t>((*in)[i]);
  *value = static_cast<Int>(sum);
  in->remove_prefix(sizeof(Int));
  return true;
}

}  // namespace kvshrink::store
