// The part of the DLPack specification (version 1.3) that fastcnn uses: the plain tensor description and the C exchange
// API through which torch.Tensor hands one out without a Python call. Declared here so that no header of torch's is
// needed. Specification: https://dmlc.github.io/dlpack/latest/
#pragma once

#include <cstdint>

extern "C" {

typedef struct {
  uint32_t major;
  uint32_t minor;
} DLPackVersion;

typedef enum : int32_t { kDLCPU = 1, kDLCUDA = 2 } DLDeviceType;

typedef struct {
  DLDeviceType device_type;
  int32_t device_id;
} DLDevice;

enum { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4 };

typedef struct {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
} DLDataType;

typedef struct {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
} DLTensor;

typedef struct DLPackExchangeAPIHeader {
  DLPackVersion version;
  struct DLPackExchangeAPIHeader* prev_api;
} DLPackExchangeAPIHeader;

// Members that fastcnn never calls are declared as untyped pointers.
typedef struct {
  DLPackExchangeAPIHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  // Fills a description that stays valid while the tensor does. Returns 0, or -1 with a Python error set. May be null.
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
  // The stream that the framework currently launches on for a device.
  int (*current_work_stream)(DLDeviceType device_type, int32_t device_id, void** out_stream);
} DLPackExchangeAPI;

}  // extern "C"
