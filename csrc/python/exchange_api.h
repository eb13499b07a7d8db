// The C side of DLPack's exchange protocol (version 1), as torch publishes it at torch.Tensor.__dlpack_c_exchange_api__
// since 2.10: a table of functions, of which one describes a tensor in place, without allocating or synchronising.
// Declared here because the protocol is a stable ABI and building needs no torch.
#pragma once

#include <cstdint>

namespace fused_sam::dlpack {

constexpr int32_t kCpu = 1, kCuda = 2, kOneApi = 14;
constexpr uint8_t kFloat = 2, kBfloat = 4;

struct Description {
  void* data;
  struct {
    int32_t type, index;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  void* allocate;
  void* export_managed;
  void* import_managed;
  int (*describe)(void* tensor, Description* out);  // may be null
  void* current_stream;
};

}  // namespace fused_sam::dlpack
