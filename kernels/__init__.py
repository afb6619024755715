"""The operations of a forward pass: torch and triton only, one file an operation.

Each file holds the operation in plain torch: the path on a CPU and the oracle for any faster
version beside it. This package imports no other code of the project.
"""

#: transformers probes for a distribution called ``kernels``; ours says that it is not that one.
__version__ = "0.0.0"
