// SPDX-License-Identifier: MIT
// Error messages, put together without a C++ stream: with some Python builds two copies of the C++ library are loaded,
// and a stream that was set up by the other copy crashes when it writes a number.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarTypeToTypeMeta.h>

#include <string>

namespace gs::binding {

inline std::string text_of(const char* text) { return text; }
inline std::string text_of(int64_t value) { return std::to_string(value); }
inline std::string text_of(const at::Device& device) { return device.str(); }
inline std::string text_of(at::ScalarType dtype) { return std::string(c10::scalarTypeToTypeMeta(dtype).name()); }
inline std::string text_of(at::IntArrayRef values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); i++) text += (i > 0 ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

template <class... Parts>
std::string message(const Parts&... parts) {
  return (text_of(parts) + ...);
}

}  // namespace gs::binding
