// The life of chunks through the unary RPCs, ServerInfo, and reflection.
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/unit/service/daemon_fixture.h"
#include "tests/unit/service/raw_call.h"

namespace kvshrink::service::testing {
namespace {

using grpc::StatusCode;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

template <class Request, class Response>
grpc::Status Call(Daemon& daemon,
                  grpc::Status (v1::KVShrink::Stub::*method)(grpc::ClientContext*, const Request&,
                                                             Response*),
                  const Request& request, Response* response) {
  grpc::ClientContext context;
  return (daemon.stub().*method)(&context, request, response);
}

v1::LookupRequest LookupOf(const std::vector<std::string>& keys) {
  v1::LookupRequest request;
  request.set_namespace_("model");
  for (const std::string& key : keys) {
    request.add_keys(key);
  }
  return request;
}

TEST(Life, LookupLeasesAndReleaseEndsTheLease) {
  Daemon daemon;
  PutChunk(daemon, "a", 1, 1);
  PutChunk(daemon, "b", 1, 2);
  PutChunk(daemon, "d", 1, 3);
  v1::LookupResponse found;
  ASSERT_TRUE(
      Call(daemon, &v1::KVShrink::Stub::Lookup, LookupOf({"a", "b", "c", "d"}), &found).ok());
  EXPECT_EQ(found.present(), 2U);
  EXPECT_EQ(found.tokens(), 2U * kShape.tokens);
  EXPECT_NE(found.lease_id(), 0U);
  EXPECT_EQ(found.lease_ms(), 30'000U);

  v1::DeleteRequest remove;
  *remove.add_chunks() = Id("a");
  *remove.add_chunks() = Id("d");
  *remove.add_chunks() = Id("x");
  v1::DeleteResponse removed;
  ASSERT_TRUE(Call(daemon, &v1::KVShrink::Stub::Delete, remove, &removed).ok());
  EXPECT_EQ(removed.statuses(0).code(), StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(removed.statuses(1).code(), 0);
  EXPECT_EQ(removed.statuses(2).code(), StatusCode::NOT_FOUND);

  v1::ReleaseRequest release;
  release.set_lease_id(found.lease_id());
  v1::ReleaseResponse released;
  ASSERT_TRUE(Call(daemon, &v1::KVShrink::Stub::Release, release, &released).ok());
  EXPECT_TRUE(released.released());
  ASSERT_TRUE(Call(daemon, &v1::KVShrink::Stub::Release, release, &released).ok());
  EXPECT_FALSE(released.released());
  removed.Clear();
  ASSERT_TRUE(Call(daemon, &v1::KVShrink::Stub::Delete, remove, &removed).ok());
  EXPECT_EQ(removed.statuses(0).code(), 0);

  v1::LookupResponse nothing;
  ASSERT_TRUE(Call(daemon, &v1::KVShrink::Stub::Lookup, LookupOf({"a"}), &nothing).ok());
  EXPECT_EQ(nothing.present(), 0U);
  EXPECT_EQ(nothing.lease_id(), 0U);
}

TEST(Life, LookupRefusesBadRequests) {
  Daemon daemon;
  v1::LookupResponse response;
  const auto message = [&](const v1::LookupRequest& request) {
    const grpc::Status status = Call(daemon, &v1::KVShrink::Stub::Lookup, request, &response);
    EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT);
    return status.error_message();
  };
  v1::LookupRequest request = LookupOf({"a", ""});
  EXPECT_THAT(message(request), HasSubstr("'keys[1]' is 0 bytes"));
  request = LookupOf({"a"});
  request.clear_namespace_();
  EXPECT_THAT(message(request), HasSubstr("'namespace' is 0 bytes"));
  request = LookupOf({"a"});
  request.set_lease_ms(600'001);
  EXPECT_THAT(message(request), HasSubstr("'lease_ms' is 600001"));
  // The largest legal request is taken, one key more is refused by name.
  request = LookupOf(std::vector<std::string>(65536, std::string(128, 'k')));
  EXPECT_TRUE(Call(daemon, &v1::KVShrink::Stub::Lookup, request, &response).ok());
  request.add_keys("k");
  EXPECT_THAT(message(request), HasSubstr("'keys' is 65537 keys"));
}

TEST(Life, CommitNamesWhatIsMissing) {
  Daemon daemon;
  PutAll(daemon.stub(), {{TensorHeader(1, "a", 1, 3), MakeBody(kShape, 1)}});
  v1::CommitResponse response = Commit(daemon, {"a", "unknown", ""});
  ASSERT_EQ(response.statuses_size(), 3);
  EXPECT_EQ(response.statuses(0).code(), StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(response.statuses(0).message(), HasSubstr("0"));
  EXPECT_THAT(response.statuses(0).message(), HasSubstr("2"));
  EXPECT_EQ(response.statuses(1).code(), StatusCode::NOT_FOUND);
  EXPECT_EQ(response.statuses(2).code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(response.statuses(2).message(), HasSubstr("'chunks[2].key'"));
  PutAll(daemon.stub(), {{TensorHeader(1, "a", 0, 3), MakeBody(kShape, 2)},
                         {TensorHeader(2, "a", 2, 3), MakeBody(kShape, 3)}});
  EXPECT_EQ(Commit(daemon, {"a"}).statuses(0).code(), 0);
  EXPECT_EQ(Commit(daemon, {"a"}).statuses(0).code(), 0);
  v1::CommitRequest empty;
  const grpc::Status status = Call(daemon, &v1::KVShrink::Stub::Commit, empty, &response);
  EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT);
}

TEST(Life, StatShowsAChunkBeforeAndAfterItsCommit) {
  Daemon daemon;
  v1::StatRequest request;
  *request.mutable_chunk() = Id("a");
  v1::StatResponse stat;
  EXPECT_EQ(Call(daemon, &v1::KVShrink::Stub::Stat, request, &stat).error_code(),
            StatusCode::NOT_FOUND);
  PutAll(daemon.stub(), {{TensorHeader(1, "a", 1, 2), MakeBody(kShape, 1)}});
  ASSERT_TRUE(Call(daemon, &v1::KVShrink::Stub::Stat, request, &stat).ok());
  EXPECT_FALSE(stat.chunk().committed());
  EXPECT_EQ(stat.chunk().layers(), 2U);
  EXPECT_EQ(stat.chunk().layers_present(), 1U);
  PutAll(daemon.stub(), {{TensorHeader(1, "a", 0, 2), MakeBody(kShape, 2)}});
  ASSERT_EQ(Commit(daemon, {"a"}).statuses(0).code(), 0);
  ASSERT_TRUE(Call(daemon, &v1::KVShrink::Stub::Stat, request, &stat).ok());
  EXPECT_TRUE(stat.chunk().committed());
  EXPECT_EQ(stat.chunk().layers_present(), 2U);
  EXPECT_EQ(stat.chunk().tokens(), kShape.tokens);
  EXPECT_EQ(stat.chunk().raw_bytes(), 4 * kShape.entries() * sizeof(float));
  EXPECT_EQ(stat.chunk().id().key(), "a");
  EXPECT_THAT(stat.chunk().tiers(), ElementsAre(v1::TIER_HOST));
  ASSERT_EQ(stat.shards_size(), 2);
  EXPECT_EQ(stat.shards(1).layer(), 1U);
  EXPECT_EQ(stat.shards(0).shape().head_dim(), kShape.head_dim);
  EXPECT_EQ(stat.shards(0).dtype(), v1::DTYPE_FP32);
  EXPECT_EQ(stat.shards(0).bytes() + stat.shards(1).bytes(), stat.chunk().bytes());
}

TEST(Life, ListPages) {
  Daemon daemon;
  for (const char* key : {"a", "b", "c"}) {
    PutChunk(daemon, key, 1, 1);
  }
  v1::ListRequest request;
  request.set_namespace_("model");
  request.set_page_size(2);
  std::vector<std::string> keys;
  do {
    v1::ListResponse page;
    ASSERT_TRUE(Call(daemon, &v1::KVShrink::Stub::List, request, &page).ok());
    EXPECT_LE(page.chunks_size(), 2);
    for (const v1::ChunkInfo& chunk : page.chunks()) {
      keys.push_back(chunk.id().key());
      EXPECT_EQ(chunk.layers_present(), 1U);
    }
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  EXPECT_THAT(keys, ElementsAre("a", "b", "c"));
  request.set_page_token("not ours");
  v1::ListResponse page;
  EXPECT_EQ(Call(daemon, &v1::KVShrink::Stub::List, request, &page).error_code(),
            StatusCode::INVALID_ARGUMENT);
  request.clear_page_token();
  request.set_page_size(10'001);
  EXPECT_EQ(Call(daemon, &v1::KVShrink::Stub::List, request, &page).error_code(),
            StatusCode::INVALID_ARGUMENT);
  request.set_page_size(0);
  request.set_namespace_("other");
  ASSERT_TRUE(Call(daemon, &v1::KVShrink::Stub::List, request, &page).ok());
  EXPECT_EQ(page.chunks_size(), 0);
}

TEST(Life, ServerInfoTellsWhatServes) {
  Daemon daemon;
  PutChunk(daemon, "a", 1, 1);
  const v1::ServerInfoResponse info = daemon.Info();
  EXPECT_EQ(info.version(), KVSHRINK_VERSION);
  EXPECT_EQ(info.backend(), "cpu");
  EXPECT_FALSE(info.device().empty());
  EXPECT_EQ(static_cast<size_t>(info.profiles_size()), AllProfiles().size());
  EXPECT_EQ(info.default_profile(), v1::PROFILE_KVS2);
  EXPECT_EQ(info.max_frame_bytes(), 1U << 20);
  EXPECT_EQ(info.max_object_bytes(), TestOptions().max_object_bytes);
  EXPECT_EQ(info.chunks(), 1U);
  EXPECT_FALSE(info.draining());
  ASSERT_EQ(info.tiers_size(), 1);
  EXPECT_EQ(info.tiers(0).tier(), v1::TIER_HOST);
  EXPECT_GT(info.tiers(0).used_bytes(), 0U);
}

TEST(Life, ADiskTierOutlivesTheDaemon) {
  Options options = TestOptions();
  options.data_dir = ::testing::TempDir() + "kvshrink_life_" + std::to_string(getpid());
  {
    Daemon daemon(options);
    PutChunk(daemon, "a", 2, 1);
    EXPECT_EQ(daemon.Info().tiers_size(), 2);
    EXPECT_FALSE(Server::Start(options).ok());  // the folder is held
  }
  Daemon daemon(options);
  v1::LookupResponse found;
  ASSERT_TRUE(Call(daemon, &v1::KVShrink::Stub::Lookup, LookupOf({"a"}), &found).ok());
  EXPECT_EQ(found.present(), 1U);
}

TEST(Life, ReflectionNamesTheService) {
  Daemon daemon;
  RawCall call(daemon.channel(), "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo");
  call.Write("\x3a\x01*");  // list_services: "*"
  const std::string services = call.Read().value_or("");
  EXPECT_THAT(services, HasSubstr("kvshrink.v1.KVShrink"));
  EXPECT_THAT(services, HasSubstr("grpc.health.v1.Health"));
}

TEST(Life, AnAddressInUseIsAClearError) {
  Daemon daemon;
  Options options = TestOptions();
  options.listen = daemon.server().listen_address();
  const absl::Status status = Server::Start(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr(options.listen));
}

}  // namespace
}  // namespace kvshrink::service::testing
