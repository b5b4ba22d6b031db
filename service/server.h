// The daemon in one object: options in, an address out, drained and stopped at the end.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kvshrink/codec.h"
#include "service/engine/codec.h"
#include "service/options.h"
#include "service/store/store.h"

namespace kvshrink::service {

// Parts that a caller may bring along instead of having them made from the options.
struct ServerParts {
  std::unique_ptr<store::Store> store;
  std::unique_ptr<Backend> backend;  // of the CPU
  std::unique_ptr<Codec> codec;      // runs on `backend`, if on any
};

class Server {
 public:
  // Opens the store, binds the addresses, serves. Errors: what the store says; UNAVAILABLE naming
  // an address that can't be bound; INVALID_ARGUMENT naming an option; FAILED_PRECONDITION for a
  // backend that can't run here.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const Options& options,
                                                       ServerParts parts = {});
  // Stops at once: what is in work is cancelled.
  virtual ~Server() = default;

  // host:port as bound.
  virtual const std::string& listen_address() const = 0;
  virtual const std::string& http_address() const = 0;  // "" when off

  // Health turns NOT_SERVING, /readyz 503; new work is refused with UNAVAILABLE, admitted work goes
  // on.
  virtual void BeginDrain() = 0;
  // Nothing admitted is left.
  virtual bool Drained() const = 0;

  // For tests and `main`: what is in use.
  virtual store::Store& store() = 0;
  virtual const Codec& codec() const = 0;
};

}  // namespace kvshrink::service
