#include "kvshrink/client/layer_ropes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvshrink::client {
namespace {

using ::testing::HasSubstr;

LayerRopes Parsed(const std::string& text) {
  const auto ropes = LayerRopes::Parse(text);
  EXPECT_TRUE(ropes.ok()) << text << ": " << ropes.status();
  return ropes.ok() ? *ropes : LayerRopes();
}

TEST(LayerRopes, EverySettingIsRead) {
  const std::string text =
      "theta=5e5,dim=64,pairing=gptj,position_offset=-7,scaling=llama3,factor=8,"
      "original_max_position=8192,low_freq_factor=1.5,high_freq_factor=4.5";
  const auto rope = Parsed(text).Of(3);
  ASSERT_TRUE(rope.has_value());
  Rope expected;
  expected.theta = 5e5;
  expected.rotary_dim = 64;
  expected.pairing = RopePairing::kGptj;
  expected.position_offset = -7;
  expected.scaling = RopeScaling::kLlama3;
  expected.factor = 8;
  expected.original_max_position = 8192;
  expected.low_freq_factor = 1.5;
  expected.high_freq_factor = 4.5;
  EXPECT_EQ(*rope, expected);
  EXPECT_EQ(Parsed(text).Text(), text);
  // What a shard's rope is shown as is also what the option takes.
  EXPECT_EQ(Parsed(RopeText(*rope)).Of(0), rope);
  const auto yarn =
      Parsed("theta=1e6,scaling=yarn-untruncated,factor=4,beta_fast=16,beta_slow=2").Of(0);
  EXPECT_EQ(yarn->scaling, RopeScaling::kYarnUntruncated);
  EXPECT_EQ(yarn->beta_fast, 16);
  EXPECT_EQ(yarn->beta_slow, 2);
  EXPECT_EQ(yarn->rotary_dim, 0U);
}

TEST(LayerRopes, ALayersOwnSettingsWin) {
  for (const char* text : {"theta=1e4,theta@5/11/17=1e6,dim@5=32,scaling@5=linear,factor@5=8",
                           "factor@5=8,theta@5/11/17=1e6,scaling@5=linear,dim@5=32,theta=1e4"}) {
    const LayerRopes ropes = Parsed(text);
    EXPECT_EQ(ropes.Of(0)->theta, 1e4);
    EXPECT_EQ(ropes.Of(17)->theta, 1e6);
    EXPECT_EQ(ropes.Of(17)->scaling, RopeScaling::kNone);
    EXPECT_EQ(ropes.Of(5)->theta, 1e6);
    EXPECT_EQ(ropes.Of(5)->rotary_dim, 32U);
    EXPECT_EQ(ropes.Of(5)->factor, 8);
  }
  const LayerRopes some = Parsed("theta=1e4,theta@3/7=none");
  EXPECT_TRUE(some.Of(2).has_value());
  EXPECT_FALSE(some.Of(3).has_value());
  EXPECT_FALSE(Parsed("theta=none,theta@3=1e4").Of(2).has_value());
  EXPECT_TRUE(Parsed("theta=none,theta@3=1e4").Of(3).has_value());
}

TEST(LayerRopes, NoneIsNone) {
  EXPECT_TRUE(Parsed("none").empty());
  EXPECT_EQ(Parsed("none").Text(), "none");
  EXPECT_FALSE(Parsed("none").Of(0).has_value());
}

TEST(LayerRopes, MetadataSayTheSame) {
  const auto ropes = LayerRopes::FromMetadata({{"rope", "post"},
                                               {"model", "m"},
                                               {"rope_theta", "1e4"},
                                               {"rope_theta@5/11", "1e6"},
                                               {"rope_dim", "32"}});
  ASSERT_TRUE(ropes.ok()) << ropes.status();
  EXPECT_EQ(ropes->Of(4)->theta, 1e4);
  EXPECT_EQ(ropes->Of(11)->theta, 1e6);
  EXPECT_EQ(ropes->Of(11)->rotary_dim, 32U);
  EXPECT_TRUE(LayerRopes::FromMetadata({{"rope", "post"}})->empty());
  EXPECT_FALSE(LayerRopes::FromMetadata({{"rope_dim", "32"}}).ok());
}

TEST(LayerRopes, ErrorsNameTheSettingAndItsValue) {
  const auto message = [](const std::string& text) {
    const absl::Status status = LayerRopes::Parse(text).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text;
    return std::string(status.message());
  };
  EXPECT_THAT(message(""), HasSubstr("must be key=value"));
  EXPECT_THAT(message("theta"), HasSubstr("'rope.theta' is '': must be key=value"));
  EXPECT_THAT(message("theta=x"), HasSubstr("'rope.theta' is 'x': must be a number"));
  EXPECT_THAT(message("theta=1e4,base=2"), HasSubstr("'rope.base' is '2': is no setting"));
  EXPECT_THAT(message("theta=1e4,pairing=half"), HasSubstr("'rope.pairing' is 'half'"));
  EXPECT_THAT(message("theta=1e4,scaling=su"), HasSubstr("'rope.scaling' is 'su'"));
  EXPECT_THAT(message("theta=1e4,dim=-2"), HasSubstr("'rope.dim' is '-2'"));
  EXPECT_THAT(message("theta=1e4,dim=none"), HasSubstr("'rope.dim' is 'none'"));
  EXPECT_THAT(message("theta=1e4,position_offset=1.5"), HasSubstr("'rope.position_offset'"));
  EXPECT_THAT(message("theta=1e4,theta=1e5"), HasSubstr("'rope.theta' is '1e5': is there twice"));
  EXPECT_THAT(message("theta=1,theta@1/2=2,theta@2/3=3"), HasSubstr("is there twice"));
  EXPECT_THAT(message("theta=1e4,theta@=2"), HasSubstr("'rope.theta@' is ''"));
  EXPECT_THAT(message("theta=1e4,theta@1/x=2"), HasSubstr("is 'x': layers must be 0..4095"));
  EXPECT_THAT(message("theta=1e4,theta@4096=2"), HasSubstr("is '4096'"));
  EXPECT_THAT(message("dim=64"), HasSubstr("'rope.theta' is '': must be given"));
  EXPECT_THAT(message("theta@3=1e4"), HasSubstr("'rope.theta' is '': must be given"));
}

}  // namespace
}  // namespace kvshrink::client
