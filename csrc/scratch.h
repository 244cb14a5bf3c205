// Memory that outlives the call. Page faults on fresh buffers cost as much as the arithmetic on
// them, so a thread keeps what its calls have used, up to KEPT_BYTES, for its next calls.
#pragma once

#include <cstdlib>
#include <new>
#include <vector>

#include "pages.h"

namespace fastcl {

constexpr size_t KEPT_BYTES = size_t(96) << 20;
constexpr size_t HUGE_PAGE = size_t(2) << 20;

class Scratch {
 public:
  explicit Scratch(size_t bytes) : piece_(take(bytes)) {}
  ~Scratch() { give_back(piece_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(piece_.address);
  }

 private:
  struct Piece {
    void* address;
    size_t bytes;
  };

  // The pieces that this thread keeps; freed when it ends.
  struct Kept {
    std::vector<Piece> pieces;
    size_t bytes = 0;
    ~Kept() {
      for (const Piece& piece : pieces) std::free(piece.address);
    }
  };
  static Kept& kept() {
    static thread_local Kept mine;
    return mine;
  }

#if defined(__SANITIZE_ADDRESS__)
  // Exactly what was asked for and nothing kept, so that the first byte past it is reported.
  static Piece take(size_t bytes) {
    void* address = nullptr;
    if (posix_memalign(&address, 64, bytes ? bytes : 1) != 0) throw std::bad_alloc();
    return {address, bytes};
  }
  static void give_back(Piece piece) { std::free(piece.address); }
#else
  static Piece take(size_t bytes) {
    Kept& mine = kept();
    size_t best = mine.pieces.size();
    for (size_t i = 0; i < mine.pieces.size(); ++i) {
      const size_t size = mine.pieces[i].bytes;
      if (size < bytes || size / 4 > bytes) continue;  // a small need must not hold a large piece
      if (best == mine.pieces.size() || size < mine.pieces[best].bytes) best = i;
    }
    if (best < mine.pieces.size()) {
      const Piece piece = mine.pieces[best];
      mine.pieces.erase(mine.pieces.begin() + int64_t(best));
      mine.bytes -= piece.bytes;
      return piece;
    }
    const size_t page = bytes >= HUGE_PAGE ? HUGE_PAGE : 64;
    bytes = (bytes + page - 1) / page * page;
    void* address = std::aligned_alloc(page, bytes ? bytes : page);
    if (address == nullptr) throw std::bad_alloc();
    if (page == HUGE_PAGE) ask_for_huge_pages(address, int64_t(bytes));
    return {address, bytes};
  }

  static void give_back(Piece piece) {
    Kept& mine = kept();
    mine.pieces.push_back(piece);
    mine.bytes += piece.bytes;
    while (mine.bytes > KEPT_BYTES) {  // the oldest goes first
      mine.bytes -= mine.pieces.front().bytes;
      std::free(mine.pieces.front().address);
      mine.pieces.erase(mine.pieces.begin());
    }
  }
#endif

  Piece piece_;
};

}  // namespace fastcl
