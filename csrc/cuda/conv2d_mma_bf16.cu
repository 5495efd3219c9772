// mma.sync convolution for bf16 (kernel and commentary: conv2d_mma.cuh). One file per type, so that they compile in
// parallel.
#include "conv2d_mma.cuh"

namespace fastcnn::cuda {

template void launch_conv2d_mma<__nv_bfloat16>(const ConvProblem&, LoadPath, int, int, const LaunchTarget&);

}  // namespace fastcnn::cuda
