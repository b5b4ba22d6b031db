#include <utility>

#include "kvshrink/client/kvs_file.h"
#include "kvshrink/client/status.h"

namespace kvshrink::client {

KvsAgreement::KvsAgreement(std::vector<uint32_t> layers) : layers_(std::move(layers)) {}

absl::Status KvsAgreement::Add(const ShardHeader& header) {
  const TensorShape& shape = header.shape;
  if (header.layer != layers_[place_]) {
    return BadShard("layer", header.layer, StrCat("the directory says ", layers_[place_]));
  }
  if (place_ == 0) {
    if (end_token_ && header.first_token != *end_token_) {
      return BadShard("first_token", header.first_token,
                      StrCat("the chunk before ends at ", *end_token_));
    }
    chunk_ = header;
  }
  if (shape.tokens != chunk_.shape.tokens) {
    return BadShard("tokens", shape.tokens, StrCat("its chunk has ", chunk_.shape.tokens));
  }
  if (header.first_token != chunk_.first_token) {
    return BadShard("first_token", header.first_token,
                    StrCat("its chunk starts at ", chunk_.first_token));
  }
  if (first_chunk_.size() < layers_.size()) {
    first_chunk_.push_back(header);
  }
  const ShardHeader& first = first_chunk_[place_];
  if (header.dtype != first.dtype) {
    return BadShard("dtype", DTypeName(header.dtype),
                    StrCat("its layer has ", DTypeName(first.dtype), " in the first chunk"));
  }
  if (shape.kv_heads != first.shape.kv_heads) {
    return BadShard("kv_heads", shape.kv_heads,
                    StrCat("its layer has ", first.shape.kv_heads, " in the first chunk"));
  }
  if (shape.head_dim != first.shape.head_dim) {
    return BadShard("head_dim", shape.head_dim,
                    StrCat("its layer has ", first.shape.head_dim, " in the first chunk"));
  }
  if (header.keys_only != first.keys_only) {
    return BadShard("flags", header.keys_only ? "keys only" : "keys and values",
                    "its layer has the other in the first chunk");
  }
  if (++place_ == layers_.size()) {
    place_ = 0;
    end_token_ = uint64_t{chunk_.first_token} + chunk_.shape.tokens;
  }
  return absl::OkStatus();
}

}  // namespace kvshrink::client
