#include "service/rpc/stream_registry.h"

#include <utility>

namespace kvshrink::service {

void StreamRegistry::Add(const std::shared_ptr<OpenStream>& stream) {
  absl::MutexLock lock(&mu_);
  streams_[stream.get()] = stream;
}

void StreamRegistry::Remove(const OpenStream* stream) {
  absl::MutexLock lock(&mu_);
  streams_.erase(stream);
}

size_t StreamRegistry::size() const {
  absl::MutexLock lock(&mu_);
  return streams_.size();
}

std::vector<std::shared_ptr<OpenStream>> StreamRegistry::All() const {
  absl::MutexLock lock(&mu_);
  std::vector<std::shared_ptr<OpenStream>> all;
  all.reserve(streams_.size());
  for (const auto& [pointer, weak] : streams_) {
    if (std::shared_ptr<OpenStream> stream = weak.lock(); stream != nullptr) {
      all.push_back(std::move(stream));
    }
  }
  return all;
}

void StreamRegistry::Drain() {
  for (const std::shared_ptr<OpenStream>& stream : All()) {
    stream->OnDrain();
  }
}

void StreamRegistry::CutOffStalled(absl::Time now, absl::Duration timeout) {
  for (const std::shared_ptr<OpenStream>& stream : All()) {
    stream->CutOffIfStalled(now, timeout);
  }
}

}  // namespace kvshrink::service
