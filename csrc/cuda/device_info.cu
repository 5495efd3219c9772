// Facts about devices and about this build. Nothing here needs a GPU to be present.
#include <array>
#include <mutex>
#include <utility>

#include "host.h"
#include "kernels.h"

#ifndef FASTCNN_CUDA_ARCHS
#define FASTCNN_CUDA_ARCHS ""
#endif

namespace fastcnn::cuda {

namespace {

struct Architecture {
  std::string name;  // "80", "90a"
  bool ptx = false;  // PTX was embedded too, which the driver compiles for later devices
};

// FASTCNN_CUDA_ARCHS is CMake's list with commas: "80-real,90a-real". Without "-real" it includes PTX.
std::vector<Architecture> architectures() {
  std::vector<Architecture> found;
  std::string entry;
  for (const char* at = FASTCNN_CUDA_ARCHS;; ++at) {
    if (*at != ',' && *at != '\0') {
      entry += *at;
      continue;
    }
    if (!entry.empty()) found.push_back({entry.substr(0, entry.find('-')), entry.find("-real") == std::string::npos});
    entry.clear();
    if (*at == '\0') return found;
  }
}

// Machine code for x.y runs on x.z with z >= y, and its PTX on everything later; code for an architecture with a suffix
// ("90a") only on x.y itself.
bool runs_on(const Architecture& architecture, int major, int minor) {
  const std::string& name = architecture.name;
  const bool specific = !name.empty() && (name.back() == 'a' || name.back() == 'f');
  const std::string digits = specific ? name.substr(0, name.size() - 1) : name;
  if (digits.size() < 2 || digits.find_first_not_of("0123456789") != std::string::npos) return false;
  const int built_major = std::stoi(digits.substr(0, digits.size() - 1));
  const int built_minor = digits.back() - '0';
  if (specific) return built_major == major && built_minor == minor;
  return built_major == major ? built_minor <= minor : architecture.ptx && built_major < major;
}

DeviceFacts read_facts(int device) {
  DeviceFacts facts;
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&facts.multiprocessors, cudaDevAttrMultiProcessorCount, device), "device attributes");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device attributes");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device attributes");
  check(cudaDeviceGetAttribute(&facts.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "device attributes");
  for (const Architecture& architecture : architectures()) {
    facts.wgmma = facts.wgmma || (architecture.name == "90a" && runs_on(architecture, major, minor));
  }
  return facts;
}

}  // namespace

DeviceFacts device_facts(int device) {
  constexpr int kCached = 64;
  static std::array<DeviceFacts, kCached> facts;
  static std::array<std::once_flag, kCached> once;
  if (device < 0 || device >= kCached) return read_facts(device);
  std::call_once(once[device], [device] { facts[device] = read_facts(device); });
  return facts[device];
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  (void)cudaGetLastError();
  return 0;
}

bool set_early_starts(bool on) {
  return std::exchange(early_starts(), on);
}

std::vector<std::string> compiled_architectures() {
  std::vector<std::string> names;
  for (const Architecture& architecture : architectures()) names.push_back(architecture.name);
  return names;
}

DeviceInfo device_info(int device) {
  cudaDeviceProp properties = {};
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  DeviceInfo info;
  info.name = properties.name;
  info.compute_major = properties.major;
  info.compute_minor = properties.minor;
  info.multiprocessors = properties.multiProcessorCount;
  info.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  info.l2_bytes = properties.l2CacheSize;
  info.shared_bytes_per_block = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  for (const Architecture& architecture : architectures()) {
    info.supported = info.supported || runs_on(architecture, info.compute_major, info.compute_minor);
  }
  return info;
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace fastcnn::cuda
