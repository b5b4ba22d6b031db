// The unary RPCs: the store's calls with their limits. Errors name the field.
#pragma once

#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "kvshrink/v1/kvshrink.pb.h"
#include "service/rpc/environment.h"

namespace kvshrink::service {

using Cancelled = absl::FunctionRef<bool()>;

absl::Status DoLookup(Environment& env, const std::string& tenant, const v1::LookupRequest& request,
                      v1::LookupResponse* response);
// Stops between chunks once `cancelled`; what was committed stays so.
absl::Status DoCommit(Environment& env, const std::string& tenant, Cancelled cancelled,
                      const v1::CommitRequest& request, v1::CommitResponse* response);
absl::Status DoDelete(Environment& env, const std::string& tenant, Cancelled cancelled,
                      const v1::DeleteRequest& request, v1::DeleteResponse* response);
absl::Status DoStat(Environment& env, const std::string& tenant, const v1::StatRequest& request,
                    v1::StatResponse* response);
absl::Status DoList(Environment& env, const std::string& tenant, const v1::ListRequest& request,
                    v1::ListResponse* response);
void FillServerInfo(const Environment& env, v1::ServerInfoResponse* response);

}  // namespace kvshrink::service
