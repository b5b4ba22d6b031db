// The one place that says whose request it is.
#pragma once

#include <grpcpp/grpcpp.h>

#include <string>

namespace kvshrink::service {

// Requests carry no identity yet, so all belong to one tenant.
inline std::string TenantOf(const grpc::CallbackServerContext& /*context*/) { return "default"; }

}  // namespace kvshrink::service
