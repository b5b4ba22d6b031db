// Any bytes as a .kvs file (FORMAT.md section 8), as they are and with checksums made right.
#include <xxhash.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "kvshrink/client/kvs_file.h"

namespace {

using namespace kvshrink;

constexpr size_t kHeaderBytes = 48;
constexpr size_t kEntryBytes = 32;

template <typename T>
T Load(const std::string& bytes, size_t offset) {
  T value = 0;
  std::memcpy(&value, bytes.data() + offset, sizeof(T));
  return value;
}

// XXH64 of [begin, begin + size) to `field`, where all that lies inside the bytes.
void SignPart(size_t begin, uint64_t size, size_t field, std::string* bytes) {
  if (begin <= bytes->size() && size <= bytes->size() - begin && field + 8 <= bytes->size()) {
    const uint64_t checksum = XXH64(bytes->data() + begin, size, 0);
    std::memcpy(bytes->data() + field, &checksum, sizeof(checksum));
  }
}

void Sign(std::string* bytes) {
  if (bytes->size() < kHeaderBytes) {
    return;
  }
  const uint64_t entries = uint64_t{Load<uint32_t>(*bytes, 8)} * Load<uint32_t>(*bytes, 12);
  const uint64_t directory_bytes = entries * kEntryBytes;
  for (uint64_t i = 0; i < entries && (i + 1) * kEntryBytes + kHeaderBytes <= bytes->size(); ++i) {
    const size_t entry = kHeaderBytes + i * kEntryBytes;
    SignPart(Load<uint64_t>(*bytes, entry + 8), Load<uint64_t>(*bytes, entry + 16), entry + 24,
             bytes);
  }
  SignPart(kHeaderBytes, directory_bytes, 24, bytes);
  SignPart(kHeaderBytes + directory_bytes, Load<uint32_t>(*bytes, 16), 32, bytes);
  SignPart(0, 40, 40, bytes);
}

void Read(const std::string& bytes) {
  const auto file = client::KvsFile::Parse(bytes);
  const absl::Status status = file.ok()
                                  ? file->ForEachShard([](const client::KvsEntry&, const Shard&) {
                                      return absl::OkStatus();
                                    })
                                  : file.status();
  if (!status.ok() && status.code() != absl::StatusCode::kDataLoss) {
    std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string bytes(reinterpret_cast<const char*>(data), size);
  Read(bytes);
  Sign(&bytes);
  Read(bytes);
  return 0;
}
