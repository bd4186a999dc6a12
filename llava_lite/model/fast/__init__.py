"""Faster paths that no model needs: oneDNN's float32 products on a CPU, Liger's kernels for training on CUDA.

Nothing in the package imports these at the top of a file; without this directory torch and transformers do the work.
"""

from llava_lite.model.fast.liger import install_liger
from llava_lite.model.fast.matmul import install

__all__ = ["install", "install_liger"]
