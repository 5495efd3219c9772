// Chooses the instruction-set variant of the CPU kernels, once.
#include <cstdlib>
#include <stdexcept>

#include "isa/table.h"
#include "kernels.h"

namespace fastcnn::cpu {
namespace {

// Best first.
std::vector<const KernelTable*> runnable_tables() {
  std::vector<const KernelTable*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
#if FASTCNN_AVX512_BF16
    if (__builtin_cpu_supports("avx512bf16")) tables.push_back(&avx512_bf16::kernel_table());
#endif
    tables.push_back(&avx512::kernel_table());
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&avx2::kernel_table());
#endif
  tables.push_back(&portable::kernel_table());
  return tables;
}

const KernelTable& choose() {
  const std::vector<const KernelTable*> tables = runnable_tables();
  const char* wanted = std::getenv("FASTCNN_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *tables.front();
  std::string known;
  for (const KernelTable* table : tables) {
    if (std::string(wanted) == table->name) return *table;
    known += std::string(known.empty() ? "" : ", ") + table->name;
  }
  throw std::invalid_argument("FASTCNN_CPU_ISA is '" + std::string(wanted) +
                              "'; this processor and build can run: " + known);
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

std::string instruction_set() {
  return kernels().name;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const KernelTable* table : runnable_tables()) names.emplace_back(table->name);
  return names;
}

}  // namespace fastcnn::cpu
