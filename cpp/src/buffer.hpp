// Scratch memory of kernels.
#pragma once

#include <cstddef>
#include <cstring>
#include <new>

namespace thalweg {

/// Cache-aligned array that only grows; new memory is zero, old contents are lost on growth.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }
  T* need(std::size_t size) {
    if (size > size_) {
      release();
      const std::size_t room = size + size / 4 + 16;
      data_ = static_cast<T*>(::operator new(room * sizeof(T), std::align_val_t(64)));
      std::memset(static_cast<void*>(data_), 0, room * sizeof(T));
      size_ = room;
    }
    return data_;
  }
  T* data() { return data_; }

 private:
  void release() {
    if (data_) ::operator delete(data_, std::align_val_t(64));
    data_ = nullptr;
    size_ = 0;
  }
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace thalweg
