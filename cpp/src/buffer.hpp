// Scratch memory of kernels.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

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

/// Floats on cache lines, zeroed when first had, with a line of room behind them. Grows to just what is asked, never
/// shrinks. Large ones lie on huge pages, which spare the look-ups of addresses in long strides.
class Floats {
 public:
  Floats() = default;
  Floats(Floats&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Floats& operator=(Floats&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Floats() { std::free(data_); }
  float* need(std::size_t size) {
    if (size > size_) {
      std::free(data_);
      size_ = 0;
      constexpr std::size_t kHugePage = std::size_t{1} << 21;
      const std::size_t wanted = size * sizeof(float) + 64;
      const std::size_t page = wanted > kHugePage / 2 ? kHugePage : 64, bytes = (wanted + page - 1) / page * page;
      data_ = static_cast<float*>(std::aligned_alloc(page, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
      if (page == kHugePage) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
      std::memset(data_, 0, bytes);
      size_ = size;
    }
    return data_;
  }
  float* data() { return data_; }
  const float* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  float* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace thalweg
