// mma.sync convolution for f16 (kernel and commentary: conv2d_mma.cuh). One file per type, so that they compile in
// parallel.
#include "conv2d_mma.cuh"

namespace fastcnn::cuda {

template void launch_conv2d_mma<__half>(const ConvProblem&, LoadPath, int, int, const LaunchTarget&);

}  // namespace fastcnn::cuda
