#include "key_space.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/loops.h"

namespace kvshrink {
namespace {

// rows (count x d) times a symmetric d x d matrix, in place, 16 rows at a time as columns of a
// panel. Each output is one sum in the order of the channels, so the result doesn't depend on how
// rows are put together.
void TimesSymmetric(const float* matrix, uint32_t d, uint32_t count, float* rows) {
  static const cpu::Loops& loops = cpu::ChooseLoops();
  constexpr size_t kPanel = cpu::kPanel;
  static thread_local std::vector<float> panel;
  static thread_local std::vector<float> product;
  panel.resize(size_t{d} * kPanel);
  product.resize(size_t{d} * kPanel);
  for (size_t first = 0; first < count; first += kPanel) {
    const size_t width = std::min(kPanel, count - first);
    std::fill(panel.begin(), panel.end(), 0.0F);
    for (size_t t = 0; t < width; ++t) {
      for (size_t c = 0; c < d; ++c) {
        panel[c * kPanel + t] = rows[(first + t) * d + c];
      }
    }
    loops.multiply(matrix, d, d, d, 1, panel.data(), product.data());
    for (size_t t = 0; t < width; ++t) {
      for (size_t c = 0; c < d; ++c) {
        rows[(first + t) * d + c] = product[c * kPanel + t];
      }
    }
  }
}

}  // namespace

KeySpace::KeySpace(const ShardHeader& header, const Basis* basis)
    : head_dim_(header.shape.head_dim),
      layer_(header.layer),
      rope_(RopeRowsOf(header)),
      basis_(header.extensions.basis.has_value() ? basis : nullptr) {}

void KeySpace::TurnBack(const BlockView& block, float* rows) const {
  if (rope_.has_value()) {
    rope_->Undo(block, rows);
  }
}

void KeySpace::Weigh(uint32_t head, uint32_t count, float* rows) const {
  TimesSymmetric(basis_->metric(layer_, head).weight, head_dim_, count, rows);
}

void KeySpace::Unweigh(uint32_t head, uint32_t count, float* rows) const {
  TimesSymmetric(basis_->metric(layer_, head).inverse, head_dim_, count, rows);
}

void KeySpace::Enter(const BlockView& block, float* rows) const {
  TurnBack(block, rows);
  if (weighs()) {
    Weigh(block.head, block.coded_rows(), rows);
  }
}

void KeySpace::Leave(const BlockView& block, float* rows) const {
  if (weighs()) {
    Unweigh(block.head, block.coded_rows(), rows);
    constexpr float kLargest = std::numeric_limits<float>::max();
    const size_t count = size_t{block.coded_rows()} * head_dim_;
    for (size_t i = 0; i < count; ++i) {
      // A sum of values near the largest may overflow both ways.
      rows[i] = rows[i] == rows[i] ? std::clamp(rows[i], -kLargest, kLargest) : 0.0F;
    }
  }
  if (rope_.has_value()) {
    rope_->Redo(block, rows);
  }
}

}  // namespace kvshrink
