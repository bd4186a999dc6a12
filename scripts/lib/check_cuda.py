"""Compare the CUDA version of torch with that of the compiler nvcc, and report if extensions cannot be built."""

import re
import shutil
import subprocess
import sys


def main():
    """Print both versions; return 1 if their first numbers differ."""
    import torch

    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout if nvcc else ""
    return report(torch.version.cuda, re.search(r"release (\d+\.\d+)", output))


def report(built_with, found):
    """Print what was found. built_with: torch.version.cuda; found: the match of nvcc's version, or None."""
    compiler = found[1] if found else None
    print(f"torch was built with CUDA {built_with}, the compiler is of CUDA {compiler}.")
    if built_with is None or compiler is None:
        return 0
    if built_with.split(".")[0] == compiler.split(".")[0]:
        return 0
    print(f"Extensions for torch cannot be built with this compiler. Install CUDA {built_with} or an image of it.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
