// The calls that cuda_check makes: every tile, every pass, every option of the kernels at small ragged shapes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/plan/plan.h"

namespace check {

using loradash::DType;

enum class Layout { kRows, kColumns, kNone };

struct Case {
  std::string name;
  DType dtype;
  loradash::Shape shape;
  int64_t rank, directions;
  Layout weight;
  // Does a base product come in, as for low_rank_update?
  bool base;
  double dropout;
  std::string tile;
  // The plan is made for a card of so many processors; 0: for the one that there is.
  int32_t processors;

  // Round(p * 65536), as the operators pass it.
  uint32_t threshold() const { return static_cast<uint32_t>(dropout * 65536 + 0.5); }
};

inline std::string dtype_name(DType dtype) { return dtype == DType::kBFloat16 ? "bf16" : "f16"; }

class Cases {
 public:
  std::vector<Case> all;

  explicit Cases(const loradash::cuda::Card& card) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      tiles(card, dtype);
      ranks(dtype);
      apart(dtype);
    }
    crowds();
  }

 private:
  void add(const std::string& what, DType dtype, loradash::Shape shape, int64_t rank, int64_t directions,
           Layout weight = Layout::kRows, double dropout = 0.1, const std::string& tile = "", bool base = false,
           int32_t processors = 0) {
    const char* drop = dropout > 0 ? "dropout" : "whole";
    all.push_back({what + "-" + dtype_name(dtype) + "-" + drop, dtype, shape, rank, directions, weight, base, dropout,
                   tile, processors});
  }

  // Every tile in both orders of W, with dropout and without, on more than one tile along both sides.
  void tiles(const loradash::cuda::Card& card, DType dtype) {
    for (const std::string& tile : loradash::cuda::gemm_tiles(card)) {
      for (const double dropout : {0.0, 0.1}) {
        add(tile + "-rows", dtype, {300, 136, 264}, 16, 8, Layout::kRows, dropout, tile);
        add(tile + "-columns", dtype, {300, 264, 136}, 16, 8, Layout::kColumns, dropout, tile);
      }
    }
    // Rows that are not whole 16-byte chunks take a tile of their own.
    add("any-rows", dtype, {130, 67, 81}, 16, 8);
    add("any-columns", dtype, {130, 67, 81}, 16, 8, Layout::kColumns);
  }

  // Every pass: by the ranks that it holds, aligned and not.
  void ranks(DType dtype) {
    const int64_t widths[][2] = {{1, 0}, {0, 4}, {31, 1}, {24, 8}, {56, 8}, {100, 60}};
    for (const auto& [rank, directions] : widths) {
      const std::string name = "ranks-" + std::to_string(rank) + "-" + std::to_string(directions);
      add(name, dtype, {150, 96, 136}, rank, directions);
      add(name + "-any", dtype, {150, 97, 139}, rank, directions);
    }
  }

  // Calls beside a library's product: the low-rank terms alone, on a bias or on a base.
  void apart(DType dtype) {
    for (const double dropout : {0.0, 0.1}) {
      for (const bool base : {false, true}) {
        const std::string name = base ? "on-a-base" : "on-a-bias";
        add(name, dtype, {200, 136, 264}, 16, 8, Layout::kNone, dropout, "", base);
        add(name + "-any", dtype, {200, 67, 121}, 16, 8, Layout::kNone, dropout, "", base);
      }
    }
  }

  // Many programs at once: splits of rows, chunks of columns, programs that walk (on a card of one processor, partial
  // sums may take little), and in one launch many blocks of rows whose programs wait for each other.
  void crowds() {
    constexpr DType kDtype = DType::kBFloat16;
    add("splits", kDtype, {1300, 1040, 1104}, 16, 8);
    add("walk-24", kDtype, {1300, 64, 2600}, 16, 8, Layout::kRows, 0.1, "", false, 1);
    add("walk-64", kDtype, {1300, 64, 1000}, 56, 8, Layout::kRows, 0.1, "", false, 1);
    add("crowd-128", kDtype, {2500, 72, 1104}, 16, 8, Layout::kRows, 0.1, "one_launch_128x128");
    add("crowd-64", kDtype, {2500, 72, 1104}, 16, 8, Layout::kRows, 0.1, "one_launch_64x128");
    add("one-row", kDtype, {1, 64, 72}, 16, 8);
  }
};

}  // namespace check
