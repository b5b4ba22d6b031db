// The metrics against a direct transcription of their definitions.
#include "kvshrink/client/attention_metrics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace kvshrink::client {
namespace {

struct Case {
  TensorShape shape{37, 2, 12};
  uint32_t queries = 9;
  uint32_t q_heads = 6;
  uint32_t first_position = 28;
  double scale = 0.31;
  std::vector<float> k, v, coded_k, coded_v, q;
};

std::vector<float> Random(size_t count, std::mt19937* generator) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) {
    value = normal(*generator);
  }
  return values;
}

Case MakeCase() {
  Case c;
  std::mt19937 generator(7);
  c.k = Random(c.shape.entries(), &generator);
  c.v = Random(c.shape.entries(), &generator);
  c.q = Random(size_t{c.queries} * c.q_heads * c.shape.head_dim, &generator);
  const std::vector<float> noise = Random(2 * c.shape.entries(), &generator);
  c.coded_k = c.k;
  c.coded_v = c.v;
  for (size_t i = 0; i < c.k.size(); ++i) {
    c.coded_k[i] += 0.1F * noise[2 * i];
    c.coded_v[i] += 0.1F * noise[2 * i + 1];
  }
  return c;
}

struct NaiveRow {
  std::vector<double> logits, weights, output;
};

NaiveRow Attend(const Case& c, const std::vector<float>& k, const std::vector<float>& v,
                size_t query, size_t q_head) {
  NaiveRow row;
  const size_t kv_head = q_head / (c.q_heads / c.shape.kv_heads);
  const size_t d = c.shape.head_dim;
  double sum = 0;
  for (size_t token = 0; token < c.shape.tokens; ++token) {
    double dot = 0;
    for (size_t j = 0; j < d; ++j) {
      dot += double{c.q[(query * c.q_heads + q_head) * d + j]} *
             double{k[(token * c.shape.kv_heads + kv_head) * d + j]};
    }
    row.logits.push_back(dot * c.scale);
    if (token <= c.first_position + query) {
      row.weights.push_back(std::exp(dot * c.scale));
      sum += row.weights.back();
    }
  }
  row.output.assign(d, 0);
  for (size_t token = 0; token < row.weights.size(); ++token) {
    row.weights[token] /= sum;
    for (size_t j = 0; j < d; ++j) {
      row.output[j] += row.weights[token] * double{v[(token * c.shape.kv_heads + kv_head) * d + j]};
    }
  }
  return row;
}

struct Naive {
  double logit_rmse = 0, attention_rel_error = 0, attention_kl = 0;
};

Naive Measure(const Case& c) {
  double logit = 0, count = 0, error = 0, energy = 0, kl = 0, rows = 0;
  for (size_t query = 0; query < c.queries; ++query) {
    for (size_t q_head = 0; q_head < c.q_heads; ++q_head, rows += 1) {
      const NaiveRow exact = Attend(c, c.k, c.v, query, q_head);
      const NaiveRow coded = Attend(c, c.coded_k, c.coded_v, query, q_head);
      for (size_t token = 0; token < exact.logits.size(); ++token, count += 1) {
        logit += std::pow(coded.logits[token] - exact.logits[token], 2);
      }
      for (size_t token = 0; token < exact.weights.size(); ++token) {
        kl += exact.weights[token] * std::log(exact.weights[token] / coded.weights[token]);
      }
      for (size_t j = 0; j < exact.output.size(); ++j) {
        error += std::pow(coded.output[j] - exact.output[j], 2);
        energy += std::pow(exact.output[j], 2);
      }
    }
  }
  return {std::sqrt(logit / count), error / energy, kl / rows};
}

KeysValues Exact(const Case& c) { return {c.shape, c.k, c.v}; }
KeysValues Coded(const Case& c) { return {c.shape, c.coded_k, c.coded_v}; }
Queries QueriesOfCase(const Case& c) { return {c.q, c.queries, c.q_heads, c.first_position}; }

TEST(AttentionMetrics, AgreesWithTheDefinitions) {
  const Case c = MakeCase();
  const Naive naive = Measure(c);
  ASSERT_GT(naive.attention_kl, 1e-4) << "the case must have an error to measure";
  const auto found = MeasureAttention(Exact(c), Coded(c), QueriesOfCase(c), c.scale, 1);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_NEAR(found->logit_rmse(), naive.logit_rmse, 1e-12);
  EXPECT_NEAR(found->attention_rel_error(), naive.attention_rel_error, 1e-12);
  EXPECT_NEAR(found->attention_kl(), naive.attention_kl, 1e-12);
  EXPECT_EQ(found->rows, 9U * 6U);
}

TEST(AttentionMetrics, ThreadsDoNotChangeABit) {
  const Case c = MakeCase();
  const auto one = MeasureAttention(Exact(c), Coded(c), QueriesOfCase(c), c.scale, 1);
  const auto many = MeasureAttention(Exact(c), Coded(c), QueriesOfCase(c), c.scale, 8);
  ASSERT_TRUE(one.ok() && many.ok());
  EXPECT_EQ(one->kl_nats, many->kl_nats);
  EXPECT_EQ(one->output_error_energy, many->output_error_energy);
}

TEST(AttentionMetrics, KeysAloneGiveLogitsAndWeights) {
  Case c = MakeCase();
  const auto both = MeasureAttention(Exact(c), Coded(c), QueriesOfCase(c), c.scale, 1);
  const KeysValues exact{c.shape, c.k, {}};
  const KeysValues coded{c.shape, c.coded_k, {}};
  const auto keys = MeasureAttention(exact, coded, QueriesOfCase(c), c.scale, 2);
  ASSERT_TRUE(both.ok() && keys.ok()) << keys.status();
  EXPECT_EQ(keys->logit_rmse(), both->logit_rmse());
  EXPECT_EQ(keys->attention_kl(), both->attention_kl());
  EXPECT_EQ(keys->outputs, 0U);
  EXPECT_EQ(both->outputs, both->rows);
  EXPECT_FALSE(MeasureAttention(exact, Coded(c), QueriesOfCase(c), c.scale, 1).ok());
  const auto attention = ComputeAttention(exact, QueriesOfCase(c), c.scale, 1);
  const auto whole = ComputeAttention(Exact(c), QueriesOfCase(c), c.scale, 1);
  ASSERT_TRUE(attention.ok() && whole.ok());
  EXPECT_EQ(attention->logits, whole->logits);
  EXPECT_TRUE(attention->output.empty());
}

TEST(AttentionMetrics, NothingChangedIsNoError) {
  const Case c = MakeCase();
  const auto found = MeasureAttention(Exact(c), Exact(c), QueriesOfCase(c), c.scale, 2);
  ASSERT_TRUE(found.ok());
  EXPECT_EQ(found->logit_rmse(), 0);
  EXPECT_EQ(found->attention_rel_error(), 0);
  EXPECT_EQ(found->attention_kl(), 0);
}

TEST(AttentionMetrics, KeysAfterAQueryCountInLogitsOnly) {
  Case c = MakeCase();
  c.first_position = 0;  // queries at 0 .. 8: tokens from 9 on are never seen
  for (size_t i = size_t{9} * c.shape.kv_heads * c.shape.head_dim; i < c.k.size(); ++i) {
    c.coded_k[i] = 1e6F;
    c.coded_v[i] = -1e6F;
  }
  const auto found = MeasureAttention(Exact(c), Coded(c), QueriesOfCase(c), c.scale, 1);
  ASSERT_TRUE(found.ok());
  EXPECT_NEAR(found->attention_kl(), Measure(c).attention_kl, 1e-12);
  EXPECT_NEAR(found->attention_rel_error(), Measure(c).attention_rel_error, 1e-12);
  EXPECT_LT(found->attention_rel_error(), 1);
  EXPECT_GT(found->logit_rmse(), 1e4);
}

TEST(AttentionMetrics, LargeLogitsStayFinite) {
  Case c = MakeCase();
  c.scale = 1e3;
  const auto found = MeasureAttention(Exact(c), Coded(c), QueriesOfCase(c), c.scale, 1);
  ASSERT_TRUE(found.ok());
  EXPECT_TRUE(std::isfinite(found->attention_kl()));
  EXPECT_TRUE(std::isfinite(found->attention_rel_error()));
}

TEST(AttentionMetrics, NotANumberIsNotHidden) {
  Case c = MakeCase();
  c.coded_v[0] = std::numeric_limits<float>::quiet_NaN();
  const auto found = MeasureAttention(Exact(c), Coded(c), QueriesOfCase(c), c.scale, 1);
  ASSERT_TRUE(found.ok());
  EXPECT_TRUE(std::isnan(found->attention_rel_error()));
}

TEST(AttentionMetrics, ExactAttentionGivesLogitsAndOutput) {
  const Case c = MakeCase();
  const auto exact = ComputeAttention(Exact(c), QueriesOfCase(c), c.scale, 2);
  ASSERT_TRUE(exact.ok());
  const NaiveRow row = Attend(c, c.k, c.v, 3, 4);
  const size_t place = 3 * c.q_heads + 4;
  EXPECT_NEAR(exact->logits[place * c.shape.tokens + 30], row.logits[30], 1e-12);
  EXPECT_EQ(exact->logits[place * c.shape.tokens + 32], -std::numeric_limits<double>::infinity());
  EXPECT_NEAR(exact->output[place * c.shape.head_dim + 5], row.output[5], 1e-12);
}

TEST(AttentionMetrics, RefusesWhatDoesNotFit) {
  const Case c = MakeCase();
  Queries queries = QueriesOfCase(c);
  queries.first_position = 29;
  EXPECT_FALSE(MeasureAttention(Exact(c), Coded(c), queries, c.scale, 1).ok());
  queries = QueriesOfCase(c);
  queries.q_heads = 5;
  EXPECT_FALSE(MeasureAttention(Exact(c), Coded(c), queries, c.scale, 1).ok());
  queries = QueriesOfCase(c);
  queries.values = queries.values.subspan(1);
  EXPECT_FALSE(MeasureAttention(Exact(c), Coded(c), queries, c.scale, 1).ok());
  KeysValues shorter = Coded(c);
  shorter.k = shorter.k.subspan(1);
  EXPECT_FALSE(MeasureAttention(Exact(c), shorter, QueriesOfCase(c), c.scale, 1).ok());
}

}  // namespace
}  // namespace kvshrink::client
