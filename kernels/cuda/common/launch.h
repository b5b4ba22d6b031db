// The module's calls, one by one: module.cu puts them in its table.
#pragma once

#include "kvshrink/cuda_api.h"

namespace kvshrink::cuda {

uint64_t ApiViewBytes(const ShardBatch& batch);
int ApiParse(const ParseParams& params, void* stream);
int ApiDecode(const DecodeParams& params, void* stream);
uint64_t ApiAttendWorkspaceBytes(const AttendParams& params);
int ApiAttend(const AttendParams& params, void* stream);
int ApiScores(const ScoresParams& params, void* stream);
int ApiTopK(const TopKParams& params, void* stream);

}  // namespace kvshrink::cuda
