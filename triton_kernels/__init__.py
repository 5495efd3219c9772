"""Triton kernels, one file per operator, installed as `fastcnn.triton_kernels`.

Every operator file has the same three parts: `@kernel` functions (the device code), a `plan_*` function that chooses a
kernel and its constants for given tensors and returns a `Launch`, and a launcher with the signature of the kernel
contract (docs/internals.md) that plans and runs. Splitting plan from run is what lets `report.py` compile exactly the
kernels that would run, for any GPU generation, on a machine without a GPU.

Importing this package does not import Triton; importing an operator module does.
"""
