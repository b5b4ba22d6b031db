#include "service/observe/http.h"

#include <sstream>
#include <utility>

#include "CivetServer.h"
#include "absl/strings/str_cat.h"
#include "kvshrink/error.h"
#include "prometheus/text_serializer.h"
#include "service/observe/address.h"

namespace kvshrink::service {
namespace {

void Answer(mg_connection* connection, int code, const char* reason, const char* type,
            const std::string& body) {
  const std::string head =
      absl::StrCat("HTTP/1.1 ", code, " ", reason, "\r\nContent-Type: ", type,
                   "\r\nContent-Length: ", body.size(), "\r\nConnection: close\r\n\r\n");
  mg_write(connection, head.data(), head.size());
  mg_write(connection, body.data(), body.size());
}

class MetricsHandler final : public CivetHandler {
 public:
  explicit MetricsHandler(const HttpHooks* hooks) : hooks_(hooks) {}

  bool handleGet(CivetServer*, mg_connection* connection) override {
    std::ostringstream text;
    prometheus::TextSerializer().Serialize(text, hooks_->metrics());
    Answer(connection, 200, "OK", "text/plain; version=0.0.4; charset=utf-8", text.str());
    return true;
  }

 private:
  const HttpHooks* hooks_;
};

class ProbeHandler final : public CivetHandler {
 public:
  explicit ProbeHandler(std::function<bool()> healthy) : healthy_(std::move(healthy)) {}

  bool handleGet(CivetServer*, mg_connection* connection) override {
    if (healthy_()) {
      Answer(connection, 200, "OK", "text/plain", "ok\n");
    } else {
      Answer(connection, 503, "Service Unavailable", "text/plain", "draining\n");
    }
    return true;
  }

 private:
  std::function<bool()> healthy_;
};

class CivetHttpServer final : public HttpServer {
 public:
  CivetHttpServer(const HostPort& at, HttpHooks hooks)
      : hooks_(std::move(hooks)),
        metrics_(&hooks_),
        live_([] { return true; }),
        ready_(hooks_.ready),
        server_({"listening_ports", at.ToString(), "num_threads", "2", "request_timeout_ms",
                 "10000", "enable_keep_alive", "no"}) {
    server_.addHandler("/metrics$", metrics_);
    server_.addHandler("/healthz$", live_);
    server_.addHandler("/readyz$", ready_);
    const std::vector<int> ports = server_.getListeningPorts();
    address_ = HostPort{at.host, ports.empty() ? at.port : ports.front()}.ToString();
  }

  const std::string& address() const override { return address_; }

 private:
  HttpHooks hooks_;
  MetricsHandler metrics_;
  ProbeHandler live_;
  ProbeHandler ready_;
  CivetServer server_;  // last: stops before what its threads call
  std::string address_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(const std::string& address,
                                                              HttpHooks hooks) {
  absl::StatusOr<HostPort> at = HostPort::Parse("http", address);
  if (!at.ok()) {
    return at.status();
  }
  try {
    return std::make_unique<CivetHttpServer>(*at, std::move(hooks));
  } catch (const CivetException& error) {  // how the library says that it can't listen
    return absl::UnavailableError(
        absl::StrCat("http: can't listen on ", address, ": ", error.what()));
  }
}

}  // namespace kvshrink::service
