// What the estimates count with that choose algorithms and cut work into tasks: of each instruction set, the machine
// its kernels were measured on, two threads of it. A choice made by them is wrong by what they are off, never in its
// result. The values: machine_costs.h.
#pragma once

namespace fastcnn::cpu {

// Cycles are a thread's. The unit that products are counted in is one word of a reduction for one pixel or tile and a
// column block, two vectors of products: a cycle at the FMA rate.
struct MachineCosts {
  double phase, task;                                // until all threads have come; to begin a task
  double near_bytes_per_cycle, far_bytes_per_cycle;  // for a thread, from L3 and from memory

  struct Direct {
    double product;  // cycles of a unit
  } direct;

  struct Winograd {  // conv2d_winograd_cut.cpp
    double l2, l3;   // bytes of which a thread, or all, may fill this much
    // By the number of points to a tile's side: cycles to transform a tile of a vector of channels there and back.
    double there[8], back[8];
    double strided_there;       // times that: tiles of phases are read from scattered places
    double product;             // cycles of a unit
    double strided_product;     // the same with a stride
    double strided_micro_tile;  // to begin and end one, at each point
    double plain;               // plain weights' kernels (conv2d_winograd_plain.cpp), over AVX-512's
  } winograd;

  struct Rows {                         // conv2d_winograd_rows.cpp
    double l2, panel_bytes, sum_bytes;  // of L2: a task's whole share, its input's, its sums'
    double there, back;                 // of a tile and a vector of words or output channels
    double product, micro_tile;         // cycles of a unit; to begin and end a chunk of sums
  } rows;

  struct Strassen {  // conv2d_strassen.cpp
    double l2;
    double near_input;           // bytes that the threads' L2 hold between them
    double near_sums, far_sums;  // of a vector of the input: reading it, storing its sums
    double end;                  // of a vector of a quadrant's sums, for each chunk
    double form;                 // of a row of the weights' sums, which each task forms
    double step, product;        // to begin a product of quadrants; cycles of a unit
  } strassen;
};

}  // namespace fastcnn::cpu
