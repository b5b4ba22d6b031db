// What the CUDA module offers, as plain structs and function pointers: no CUDA header is needed to
// call it. Streams (cudaStream_t) and pointers to device memory are void*. The contract that all
// calls share (caller's stream and workspace, no allocation, no synchronisation, graph capture) is
// told in kernels/README.md. Shapes are given in host structs that a call has read when it returns;
// "device" marks pointers to device memory, which must stay until the stream has passed the call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvshrink/block.h"
#include "kvshrink/codec.h"
#include "kvshrink/cuda_encode.h"
#include "kvshrink/cuda_runtime_api.h"

namespace kvshrink::cuda {

// Changes whenever a struct below does: library and module are built together.
inline constexpr uint32_t kAbiVersion = 4;

// Result of a call: 0, a cudaError_t, or this.
inline constexpr int kOk = 0;
inline constexpr int kBadArgument = -1;

inline constexpr uint32_t kMaxBatchShards = 65535;

// Shards of one shape class, in device memory, their bytes as proto/FORMAT.md says.
struct ShardBatch {
  const void* const* bytes = nullptr;  // device, [shards]: device pointers, multiples of 16
  const uint64_t* sizes = nullptr;     // device, [shards]
  uint32_t shards = 0;                 // 1 .. kMaxBatchShards
  uint32_t kv_heads = 0;               // of every shard
  uint32_t head_dim = 0;               // of every shard
  uint32_t max_tokens = 0;             // no shard has more
};

// What a parse or a decode found wrong with a shard's bytes: the field, in the order of the checks
// (proto/FORMAT.md section 6). A status word is `field << 32 | block`; 0 when all is well.
enum class ShardField : uint32_t {
  kNone = 0,
  kAddress,  // the pointer is null or no multiple of 16
  kSize,
  kMagic,
  kVersion,
  kHeaderChecksum,
  kHeader,  // profile, dtype, flags, first_token, layer, raw_rows, ext_bytes
  kShape,   // not the batch's heads and head_dim, or more tokens
  kIndexChecksum,
  kExtension,  // one that the device doesn't know
  kIndex,      // code, rank, exponent, reserved or factor_bytes of an entry
  kSections,   // low_bytes, scales_bytes or codes_bytes
  kFactorBits,
  kScale,
  kFactor,
  kCodes,
};

struct ParseParams {
  ShardBatch batch;
  // Bytes of device memory that a parse fills and decode and attend read; a multiple of 16.
  void* view = nullptr;
  uint64_t view_bytes = 0;
  uint64_t* status = nullptr;  // device, [shards]; overwritten
};

// Where the rows of one shard's K and V go; element (token, head, channel) lies where
// `layout` says, of token first_row + t for the shard's token t. With a block table, page p of the
// layout is block_table[p] (an engine's paged cache).
struct CudaTarget {
  void* k = nullptr;
  void* v = nullptr;
  const int32_t* block_table = nullptr;  // device, or null
  uint32_t first_row = 0;
  uint32_t reserved = 0;
};

struct DecodeParams {
  ShardBatch batch;
  const void* view = nullptr;  // as parsed for this batch
  DecodeForm form = DecodeForm::kFull;
  DType dtype = DType::kBf16;  // of the targets: bf16, fp16 or fp32
  TensorLayout layout;
  const CudaTarget* targets = nullptr;  // device, [shards]
  // What is written; the rest of the targets isn't touched. Tokens of the shard.
  uint32_t head_begin = 0, head_end = 0;
  uint32_t token_begin = 0, token_end = 0;
  bool keys = true, values = true;
  uint64_t* status = nullptr;  // device, [shards], as left by the parse
};

// Attention of query tokens against sequences whose chunks are shards of one batch (one layer).
struct AttendParams {
  ShardBatch batch;
  const void* view = nullptr;
  uint32_t sequences = 0;
  uint32_t max_chunks = 0;
  const uint32_t* chunks = nullptr;        // device, [sequences][max_chunks]: numbers of shards
  const uint32_t* chunk_counts = nullptr;  // device, [sequences]
  uint32_t queries = 1;                    // query tokens of each sequence
  uint32_t q_heads = 0;                    // a multiple of kv_heads
  const void* q = nullptr;                 // device, [sequences][queries][q_heads][head_dim]
  DType q_dtype = DType::kFp32;            // fp32, fp16 or bf16
  float scale = 0;                         // 0: 1 / sqrt(head_dim)
  float softcap = 0;                       // 0: none
  uint32_t window = 0;                     // 0: none
  // Position of each sequence's first query: query i sees positions up to it plus i. Null: all.
  const int32_t* first_query = nullptr;  // device, [sequences]
  // fp32 [sequences][queries][q_heads][head_dim] and [sequences][queries][q_heads]: what
  // AttentionAccumulator gives.
  float* output = nullptr;
  float* lse = nullptr;
  void* workspace = nullptr;  // a multiple of 16
  uint64_t workspace_bytes = 0;
  uint64_t* status = nullptr;  // device, [shards]
};

struct ScoresParams {
  AttendParams attend;  // output, lse and workspace aren't used
  // fp32 [sequences][queries][q_heads][stride]: the logits of the sequence's tokens in the order of
  // its chunks; -inf where a query doesn't see the key, and past the last token.
  float* logits = nullptr;
  uint32_t stride = 0;
};

// The k largest of each row of logits, descending; of equal ones the lower place first. Places past
// the number of logits above -inf hold -inf and UINT32_MAX.
struct TopKParams {
  const float* logits = nullptr;  // device, [rows][stride]
  uint32_t rows = 0;
  uint32_t stride = 0;
  uint32_t k = 0;              // 1 .. kMaxTopK
  float* values = nullptr;     // device, [rows][k]
  uint32_t* places = nullptr;  // device, [rows][k]
};
inline constexpr uint32_t kMaxTopK = 1024;

// What the module exports under the name kEntryPoint, as `const CudaApi* (uint32_t abi)`: null when
// it was built for another ABI.
struct CudaApi {
  uint32_t abi = 0;
  // Text of a result; static storage.
  const char* (*result_text)(int result) = nullptr;
  // Devices of this machine; a result other than kOk where there is no driver.
  int (*device_count)(int* count) = nullptr;

  // Bytes of a batch's view; 0 when the batch is out of range.
  uint64_t (*view_bytes)(const ShardBatch& batch) = nullptr;
  int (*parse)(const ParseParams& params, void* stream) = nullptr;
  int (*decode)(const DecodeParams& params, void* stream) = nullptr;

  uint64_t (*attend_workspace_bytes)(const AttendParams& params) = nullptr;
  int (*attend)(const AttendParams& params, void* stream) = nullptr;
  int (*scores)(const ScoresParams& params, void* stream) = nullptr;
  int (*top_k)(const TopKParams& params, void* stream) = nullptr;

  // Memory, streams, events and copies, for callers that link no CUDA.
  const CudaRuntimeApi* runtime = nullptr;
  const CudaEncodeApi* encode = nullptr;
};

inline constexpr const char* kEntryPoint = "kvshrink_cuda_api";

}  // namespace kvshrink::cuda
