// A kvshrinkd, spoken to synchronously. Streams are pipelined inside: see put_stream.h and the
// calls below.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvshrink/client/put_stream.h"
#include "kvshrink/client/remote_options.h"
#include "kvshrink/v1/kvshrink.grpc.pb.h"

namespace kvshrink::client {

// An answer of Get: one shard, or what is wrong with a chunk.
struct GotShard {
  size_t chunk = 0;      // index into the keys asked for
  v1::GetHeader header;  // its status is OK when the body is there
  std::string body;      // complete
};

struct GetQuery {
  std::string name_space;
  std::vector<std::string> keys;
  std::vector<uint32_t> layers;  // ascending; empty = all
  v1::GetForm form = v1::GET_FORM_SHARD;
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;  // DECODED: unspecified = the original's
};

struct AttendResult {
  v1::AttendAnswer answer;
  std::string body;  // see AttendAnswer in kvshrink.proto
  uint64_t wire_bytes = 0;
};

// Thread-safe. Unary calls are tried again after RESOURCE_EXHAUSTED or UNAVAILABLE with a pushback,
// for at most retry_for_ms. Errors of all calls: what the server says; UNAVAILABLE when it isn't
// there; DEADLINE_EXCEEDED; DATA_LOSS when it breaks the protocol.
class Remote {
 public:
  // Does no I/O. Errors: INVALID_ARGUMENT naming the option.
  static absl::StatusOr<std::unique_ptr<Remote>> Create(const RemoteOptions& options);

  absl::StatusOr<v1::ServerInfoResponse> Info();
  // `keys` at most 65536.
  absl::StatusOr<v1::LookupResponse> Lookup(const std::string& name_space,
                                            const std::vector<std::string>& keys,
                                            uint32_t lease_ms);
  absl::StatusOr<v1::ReleaseResponse> Release(uint64_t lease_id);
  // One status per key, in order; any number of keys.
  absl::StatusOr<std::vector<absl::Status>> Commit(const std::string& name_space,
                                                   const std::vector<std::string>& keys);
  absl::StatusOr<std::vector<absl::Status>> Delete(const std::string& name_space,
                                                   const std::vector<std::string>& keys);
  absl::StatusOr<v1::StatResponse> Stat(const std::string& name_space, const std::string& key);
  // All committed chunks, page by page; stops at the first error of `visit`. `name_space` empty =
  // all.
  absl::Status List(const std::string& name_space,
                    const std::function<absl::Status(const v1::ChunkInfo&)>& visit);

  // Opens a stream of objects to store. It must not outlive the Remote.
  std::unique_ptr<PutStream> Put(PutStream::OnAnswer on_answer);

  // Calls `visit` for every answer in order, chunk by chunk, layer by layer, on this thread; stops
  // at the first error of `visit`. `wire_bytes`, may be null: bytes of the answers' messages.
  absl::Status Get(const GetQuery& query, const std::function<absl::Status(GotShard)>& visit,
                   uint64_t* wire_bytes = nullptr);

  // One request. `queries`: the body that `header` announces. The header's request_id is set here.
  absl::StatusOr<AttendResult> Attend(v1::AttendHeader header, std::string_view queries);

  const RemoteOptions& options() const { return options_; }

 private:
  Remote(RemoteOptions options, std::unique_ptr<v1::KVShrink::Stub> stub);

  RemoteOptions options_;
  std::unique_ptr<v1::KVShrink::Stub> stub_;
};

}  // namespace kvshrink::client
