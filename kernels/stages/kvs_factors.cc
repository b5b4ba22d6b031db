#include "stages/kvs_factors.h"

namespace kvshrink::stages {

size_t KvsFactorBytes(std::span<const FactorBits> bits, uint32_t n, uint32_t d) {
  size_t total_bits = 0;
  for (const FactorBits& component : bits) {
    total_bits +=
        static_cast<size_t>(component.channel) * d + static_cast<size_t>(component.token) * n;
  }
  return 2 * bits.size() + (total_bits + 7) / 8;
}

void WriteKvsFactors(std::span<const KvsComponent> components, std::vector<uint8_t>* out) {
  for (const KvsComponent& component : components) {
    out->push_back(static_cast<uint8_t>(component.bits.token + 16 * component.bits.channel));
    out->push_back(component.scale);
  }
  BitWriter writer(out);
  for (const KvsComponent& component : components) {
    for (const uint8_t digit : component.channel) {
      writer.Put(digit, component.bits.channel);
    }
    for (const uint8_t digit : component.token) {
      writer.Put(digit, component.bits.token);
    }
  }
}

void ReadKvsFactors(std::span<const uint8_t> record, uint32_t rank, uint32_t n, uint32_t d,
                    std::vector<KvsComponent>* components) {
  components->resize(rank);
  for (uint32_t i = 0; i < rank; ++i) {
    KvsComponent& component = (*components)[i];
    component.bits = {record[2 * i] & 15, record[2 * i] >> 4};
    component.scale = record[2 * i + 1];
  }
  BitReader reader(record.subspan(size_t{2} * rank));
  for (KvsComponent& component : *components) {
    component.channel.resize(d);
    for (uint8_t& digit : component.channel) {
      digit = static_cast<uint8_t>(reader.Get(component.bits.channel));
    }
    component.token.resize(n);
    for (uint8_t& digit : component.token) {
      digit = static_cast<uint8_t>(reader.Get(component.bits.token));
    }
  }
}

}  // namespace kvshrink::stages
