// What the estimates count with that choose algorithms and cut work into tasks: of each instruction set, the machine
// its kernels were measured on, two threads of it. A choice made by them is wrong by what they are off, never in its
// result. Here are the values of AVX-512 on Zen 5: two 512-bit FMA units, 1 MiB of L2, 32 MiB of L3 shared, memory at
// some 12 bytes a cycle. machine_costs.h has what differs elsewhere.
#pragma once

namespace fastcnn::cpu {

// Cycles are a thread's. The unit that products are counted in is one word of a reduction for one pixel or tile and a
// column block, two vectors of products: a cycle at the FMA rate.
struct MachineCosts {
  double phase = 6000, task = 1000;                           // until all threads have come; to begin a task
  double near_bytes_per_cycle = 12, far_bytes_per_cycle = 9;  // for a thread, from L3 and from memory
  double near_weights = 0;  // bytes: so few come at a rate between the two, as L3 holds all of a small network's

  struct Direct {
    double product = 1.14;  // cycles of a unit
  } direct;

  struct Winograd {                        // conv2d_winograd_cut.cpp
    double l2 = 832 << 10, l3 = 16 << 20;  // bytes of which a thread, or all, may fill this much
    double panel_l2 = 832 << 10;           // a panel and what is used beside it stay in L2 up to here
    // By the number of points to a tile's side: cycles to transform a tile of a vector of channels there and back.
    double there[9] = {0, 0, 0, 80, 90, 0, 270, 270, 820}, back[9] = {0, 0, 0, 60, 90, 0, 270, 330, 480};
    double strided_there = 2;        // times that: tiles of phases are read from scattered places
    double product = 1.06;           // cycles of a unit
    double strided_product = 1.06;   // the same with a stride
    double strided_micro_tile = 45;  // to begin and end one, at each point
    double plain = 1;                // plain weights' kernels (conv2d_winograd_plain.cpp), over AVX-512's
    int columns_at_once = 1;         // column blocks that may be formed together, at most
  } winograd;

  struct Rows {  // conv2d_winograd_rows.cpp
    double l2 = 832 << 10, panel_bytes = 640 << 10,
           sum_bytes = 64 << 10;             // of L2: a task's share, its input's, its sums'
    double there = 36, back = 44;            // of a tile and a vector of words or output channels
    double product = 1.16, micro_tile = 40;  // cycles of a unit; to begin and end a chunk of sums
  } rows;

  struct Strassen {  // conv2d_strassen.cpp
    double l2 = 700 << 10;
    double near_input = 2 << 20;          // bytes that the threads' L2 hold between them
    double near_sums = 5, far_sums = 10;  // of a vector of the input: reading it, storing its sums
    double end = 3;                       // of a vector of a quadrant's sums, for each chunk
    double form = 2.5;                    // of a row of the weights' sums, which each task forms
    double step = 30, product = 1.04;     // to begin a product of quadrants; cycles of a unit
  } strassen;
};

}  // namespace fastcnn::cpu
