"""Functional operators: :mod:`torch.nn.functional`'s with fusion as keyword-only arguments, and the five fused ones."""

from fastcnn.ops.batch_norm import batch_norm, fold_batch_norm
from fastcnn.ops.batch_statistics import batch_statistics
from fastcnn.ops.channel_affine import channel_affine
from fastcnn.ops.conv2d import conv2d
from fastcnn.ops.conv2d_1x1_pair import conv2d_1x1_pair
from fastcnn.ops.conv2d_max_pool2d import conv2d_max_pool2d
from fastcnn.ops.fused import bottleneck_projection, conv_bn_relu, dense_concat, inception_concat
from fastcnn.ops.linear import linear
from fastcnn.ops.local_response_norm import local_response_norm
from fastcnn.ops.pool2d import adaptive_avg_pool2d, avg_pool2d, global_avg_pool2d, max_pool2d
from fastcnn.ops.residual_add import residual_add

__all__ = [
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "batch_statistics",
    "bottleneck_projection",
    "channel_affine",
    "conv2d",
    "conv2d_1x1_pair",
    "conv2d_max_pool2d",
    "conv_bn_relu",
    "dense_concat",
    "fold_batch_norm",
    "global_avg_pool2d",
    "inception_concat",
    "linear",
    "local_response_norm",
    "max_pool2d",
    "residual_add",
]
