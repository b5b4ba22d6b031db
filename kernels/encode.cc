// Tensors to shards.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "format/layout.h"
#include "format/shard_writer.h"
#include "gather.h"
#include "key_space.h"
#include "kvshrink/codec.h"
#include "kvshrink/error.h"
#include "rate_target.h"
#include "stages/exponent.h"

namespace kvshrink {
namespace {

// Blocks that are in fp32 at a time: bounds the memory beside input and output, enough to keep
// threads busy.
constexpr size_t kBatchBlocks = 64;
constexpr double kMostBitsPerEntry = 64;

absl::Status CheckTensor(std::string_view name, const ConstTensor& tensor) {
  KVSHRINK_RETURN_IF_ERROR(ValidateShape(tensor.shape));
  if (!LayoutExtent(tensor.shape, tensor.layout).has_value()) {
    return BadArgument(StrCat(name, ".layout"), tensor.layout.token_stride,
                       "its strides reach too far");
  }
  if (tensor.data == nullptr) {
    return BadArgument(StrCat(name, ".data"), "null", "must point at the tensor");
  }
  return absl::OkStatus();
}

absl::Status CheckValues(const ConstTensor& k, const ConstTensor& v) {
  KVSHRINK_RETURN_IF_ERROR(CheckTensor("v", v));
  if (k.shape != v.shape) {
    return BadArgument(
        "v.shape", StrCat("[", v.shape.tokens, ",", v.shape.kv_heads, ",", v.shape.head_dim, "]"),
        "must be the shape of k");
  }
  if (k.dtype != v.dtype) {
    return BadArgument("v.dtype", DTypeName(v.dtype), "must be the dtype of k");
  }
  return absl::OkStatus();
}

absl::Status CheckArguments(const ConstTensor& k, const std::optional<ConstTensor>& v,
                            const EncodeOptions& options) {
  KVSHRINK_RETURN_IF_ERROR(CheckTensor("k", k));
  if (v.has_value()) {
    KVSHRINK_RETURN_IF_ERROR(CheckValues(k, *v));
  }
  if (options.layer > kMaxLayer) {
    return BadArgument("layer", options.layer, StrCat("must be at most ", kMaxLayer));
  }
  if (options.first_token > kMaxPosition - k.shape.tokens) {
    return BadArgument("first_token", options.first_token,
                       StrCat("first_token + tokens must be at most ", kMaxPosition));
  }
  if (!(options.max_relative_error >= 0) || !std::isfinite(options.max_relative_error)) {
    return BadArgument("max_relative_error", options.max_relative_error,
                       "must be finite and not negative");
  }
  if (options.rope.has_value()) {
    KVSHRINK_RETURN_IF_ERROR(ValidateRope(*options.rope, k.shape.head_dim));
  }
  if (NeedsBasis(options.profile)) {
    if (options.basis == nullptr) {
      return BadArgument(
          "basis", "none",
          StrCat("profile ", GetProfileInfo(options.profile).name, " needs a calibrated one"));
    }
    KVSHRINK_RETURN_IF_ERROR(CheckBasisFits(*options.basis, options.layer, k.shape.head_dim,
                                            k.shape.kv_heads, options.rope));
  }
  return CheckRate(options);
}

ShardHeader HeaderOf(const ConstTensor& k, bool has_v, const EncodeOptions& options) {
  ShardHeader header;
  header.profile = options.profile;
  header.dtype = k.dtype;
  header.shape = k.shape;
  header.first_token = options.first_token;
  header.layer = options.layer;
  header.padded = options.fixed_size;
  header.keys_only = !has_v;
  header.raw_rows = RawRows(options, k.shape.tokens);
  if (options.rope.has_value() && options.profile != Profile::kRaw) {
    header.extensions.rope = options.rope;
    uint32_t& rotary_dim = header.extensions.rope->rotary_dim;
    rotary_dim = rotary_dim == 0 ? k.shape.head_dim : rotary_dim;
  }
  if (NeedsBasis(options.profile)) {
    header.extensions.basis = options.basis->id();
  }
  return header;
}

// A block just coded, as its decoder will see it.
BlockView ViewOf(const BlockView& place, const Backend::BlockOutput& output) {
  BlockView block = place;
  block.exponent = output.exponent;
  block.code = output.code;
  block.rank = output.rank;
  block.factors = output.factors;
  block.scales = output.scales;
  block.codes = output.codes;
  return block;
}

// Encodes the blocks of a shard batch by batch.
class ShardEncoder {
 public:
  ShardEncoder(const Backend& backend, const ConstTensor& k, const std::optional<ConstTensor>& v,
               const EncodeOptions& options)
      : backend_(backend),
        k_(k),
        v_(v),
        options_(options),
        header_(HeaderOf(k, v.has_value(), options)),
        key_space_(header_, options.basis) {
    settings_ = {options.profile, options.max_relative_error, DTypeBytes(k.dtype)};
    places_.resize(header_.blocks());
    for (uint32_t i = 0; i < header_.blocks(); ++i) {
      format::PlaceBlock(header_, i, &places_[i]);
    }
    coded_.resize(header_.blocks());
    energy_.resize(header_.blocks());
  }

  absl::StatusOr<std::string> Run(ShardReport* report) {
    if (options_.bits_per_entry > 0) {
      KVSHRINK_RETURN_IF_ERROR(Plan());
    }
    ForEachBatch([this](size_t first) { EncodeBatch(first); });
    std::string bytes = format::WriteShard(header_, coded_, slot_bytes());
    if (report != nullptr) {
      *report = MakeReport(bytes.size());
    }
    return bytes;
  }

 private:
  const ConstTensor& TensorOf(const BlockView& place) const {
    return place.kind == Kind::kKey ? k_ : *v_;
  }

  // Of a shard with a fixed size; else 0.
  uint64_t slot_bytes() const {
    return header_.padded ? ShardBytesAt(header_.shape, options_.bits_per_entry, header_.keys_only)
                          : 0;
  }

  void ForEachBatch(absl::FunctionRef<void(size_t)> body) {
    const size_t keys = size_t{header_.shape.kv_heads} * header_.blocks_per_head();
    for (const auto& [begin, end] : {std::pair(size_t{0}, keys), std::pair(keys, places_.size())}) {
      for (size_t first = begin; first < end; first += kBatchBlocks) {  // a batch is of one kind
        LoadBatch(first, std::min(kBatchBlocks, end - first));
        body(first);
      }
    }
  }

  // Leaves the rows of the batch's blocks in `inputs_`.
  void LoadBatch(size_t first, size_t count) {
    const size_t d = header_.shape.head_dim;
    rows_.resize(count * kBlockTokens * d);
    inputs_.resize(count);
    backend_.ForEach(count, [&](size_t i) {
      const BlockView& place = places_[first + i];
      float* rows = rows_.data() + i * kBlockTokens * d;
      GatherRows(TensorOf(place), {place.head, place.first_row, place.rows}, rows);
      energy_[first + i] = stages::SumOfSquares(rows, place.rows * d);
      if (place.kind == Kind::kKey) {
        key_space_.Enter(place, rows + place.raw_rows * d);
      }
      inputs_[i] = {rows,           place.kind,
                    place.rows,     header_.shape.head_dim,
                    place.raw_rows, plans_.empty() ? nullptr : &plans_[first + i]};
    });
  }

  absl::Status Plan() {
    std::vector<Backend::BlockSpectrum> spectra(places_.size());
    ForEachBatch([&](size_t first) {
      backend_.AnalyseBlocks(settings_, inputs_, std::span(spectra).subspan(first, inputs_.size()));
    });
    absl::StatusOr<std::vector<BlockPlan>> plans =
        PlanForRate(header_, places_, spectra, options_.bits_per_entry);
    KVSHRINK_RETURN_IF_ERROR(plans.status());
    plans_ = *std::move(plans);
    return absl::OkStatus();
  }

  void EncodeBatch(size_t first) {
    outputs_.resize(inputs_.size());
    if (places_[first].kind == Kind::kKey && key_space_.weighs()) {
      EncodeWeighed(first);
    } else {
      backend_.EncodeBlocks(settings_, inputs_, outputs_);
    }
    for (size_t i = 0; i < inputs_.size(); ++i) {
      const BlockView& place = places_[first + i];
      format::CodedBlock& coded = coded_[first + i];
      AppendRowBytes(TensorOf(place), {place.head, place.first_row, place.raw_rows},
                     &coded.raw_rows);
      if (outputs_[i].code == BlockCode::kRaw) {
        AppendRowBytes(TensorOf(place),
                       {place.head, place.first_row + place.raw_rows, place.coded_rows()},
                       &coded.raw_block);
      }
      coded.output = std::move(outputs_[i]);
    }
  }

  // Errors of weighed blocks count where decoders see them, after the weights are taken back, so
  // the bound on them is kept here: blocks over it are coded again with the next code.
  void EncodeWeighed(size_t first) {
    Backend::BlockSettings settings = settings_;
    settings.max_relative_error = 0;
    std::vector<size_t> open(inputs_.size());  // numbers within the batch
    std::iota(open.begin(), open.end(), size_t{0});
    while (!open.empty()) {
      std::vector<Backend::BlockInput> inputs;
      inputs.reserve(open.size());
      for (const size_t i : open) {
        inputs.push_back(inputs_[i]);
      }
      std::vector<Backend::BlockOutput> outputs(open.size());
      backend_.EncodeBlocks(settings, inputs, outputs);
      backend_.ForEach(open.size(), [&](size_t j) {
        outputs_[open[j]] = std::move(outputs[j]);
        Measure(places_[first + open[j]], &outputs_[open[j]]);
      });
      std::erase_if(open, [&](size_t i) {
        return settings_.max_relative_error == 0 ||
               !(outputs_[i].error_energy > settings_.max_relative_error * outputs_[i].energy);
      });
      for (const size_t i : open) {
        ++inputs_[i].skipped_codes;
      }
    }
  }

  // Sets error and energy of a weighed block, whose rows the embedding doesn't lengthen.
  void Measure(const BlockView& place, Backend::BlockOutput* output) const {
    static thread_local std::vector<float> source;
    static thread_local std::vector<float> decoded;
    const size_t d = header_.shape.head_dim;
    source.resize(place.coded_rows() * d);
    decoded.resize(source.size());
    GatherRows(k_, {place.head, place.first_row + place.raw_rows, place.coded_rows()},
               source.data());
    key_space_.TurnBack(place, source.data());
    output->energy = stages::SumOfSquares(source.data(), source.size());
    output->error_energy = 0;
    if (output->code == BlockCode::kRaw) {
      return;
    }
    // What was just coded decodes.
    (void)backend_.DecodeBlock(GetProfileInfo(header_.profile).family, ViewOf(place, *output),
                               header_.shape.head_dim, DecodeForm::kFull, decoded.data());
    key_space_.Unweigh(place.head, place.coded_rows(), decoded.data());
    for (size_t i = 0; i < source.size(); ++i) {
      const double difference = static_cast<double>(source[i]) - static_cast<double>(decoded[i]);
      output->error_energy += difference * difference;
    }
  }

  ShardReport MakeReport(size_t encoded_bytes) const {
    ShardReport report;
    report.raw_bytes = header_.raw_bytes();
    report.encoded_bytes = encoded_bytes;
    report.k.entries = header_.shape.entries();
    report.v.entries = header_.keys_only ? 0 : header_.shape.entries();
    for (size_t i = 0; i < coded_.size(); ++i) {
      const Backend::BlockOutput& block = coded_[i].output;
      KindReport& kind = places_[i].kind == Kind::kKey ? report.k : report.v;
      kind.bytes += coded_[i].bytes();
      ++kind.blocks;
      if (block.code == BlockCode::kRaw) {
        ++kind.raw_blocks;
      } else {
        ++kind.rank_histogram[block.rank];
      }
      kind.escalated_blocks += block.escalated ? 1 : 0;
      if (std::isfinite(energy_[i])) {
        kind.energy += energy_[i];
        kind.error_energy += block.error_energy;
        const double relative = energy_[i] > 0 ? block.error_energy / energy_[i] : 0;
        kind.max_block_relative_error = std::max(kind.max_block_relative_error, relative);
      }
    }
    report.AddShared(encoded_bytes - report.k.bytes - report.v.bytes);
    return report;
  }

  const Backend& backend_;
  const ConstTensor& k_;
  const std::optional<ConstTensor>& v_;
  const EncodeOptions& options_;
  ShardHeader header_;
  KeySpace key_space_;
  Backend::BlockSettings settings_;
  std::vector<BlockView> places_;
  std::vector<format::CodedBlock> coded_;
  std::vector<double> energy_;
  std::vector<BlockPlan> plans_;  // with a rate target
  std::vector<float> rows_;
  std::vector<Backend::BlockInput> inputs_;
  std::vector<Backend::BlockOutput> outputs_;
};

}  // namespace

absl::Status CheckRate(const EncodeOptions& options) {
  if (!(options.bits_per_entry >= 0) || options.bits_per_entry > kMostBitsPerEntry) {
    return BadArgument("bits_per_entry", options.bits_per_entry,
                       StrCat("must be 0..", kMostBitsPerEntry));
  }
  if (options.bits_per_entry > 0 && GetProfileInfo(options.profile).family != Family::kKvs) {
    return BadArgument(
        "bits_per_entry", options.bits_per_entry,
        StrCat("needs a kvs profile; this is ", GetProfileInfo(options.profile).name));
  }
  if (options.bits_per_entry > 0 && options.max_relative_error > 0) {
    return BadArgument("max_relative_error", options.max_relative_error,
                       "can't be kept together with bits_per_entry: give one of them");
  }
  if (options.fixed_size && !(options.bits_per_entry > 0)) {
    return BadArgument("fixed_size", "true", "needs bits_per_entry");
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> EncodeShard(const Backend& backend, const ConstTensor& k,
                                        const std::optional<ConstTensor>& v,
                                        const EncodeOptions& options, ShardReport* report) {
  KVSHRINK_RETURN_IF_ERROR(CheckArguments(k, v, options));
  return ShardEncoder(backend, k, v, options).Run(report);
}

}  // namespace kvshrink
