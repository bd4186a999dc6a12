# An image that trains on NVIDIA GPUs, or on a CPU:
#   docker build -t llava-lite .
#   docker build -t llava-lite:cpu --build-arg DEVICE=cpu .
#   docker run --rm -it --gpus all --ipc=host -v /data:/data -v "$PWD/checkpoints:/workspace/checkpoints" llava-lite
# docs/gpu_installation.md explains the build arguments.

ARG DEVICE=cuda
# Its first number must be that of the CUDA which torch was built with: 13 for torch 2.13 of PyPI.
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04
ARG CPU_IMAGE=ubuntu:24.04

# With the compiler of CUDA: DeepSpeed and flash-attn build their operations with it.
FROM ${CUDA_IMAGE} AS cuda
# An index with another CUDA build of torch; empty: the build of PyPI.
ARG TORCH_INDEX_URL=
ENV TORCH_INDEX_URL=${TORCH_INDEX_URL} KERNELS=liger-kernel

FROM ${CPU_IMAGE} AS cpu
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV TORCH_INDEX_URL=${TORCH_INDEX_URL} KERNELS= DS_ACCELERATOR=cpu

FROM ${DEVICE}
ARG EXTRAS=train,peft,quant
# 1: also build flash-attn, which takes from minutes to hours. MAX_JOBS compilers run at once, each in several GB.
ARG FLASH_ATTN=0
ARG MAX_JOBS=4

# libaio-dev is for weights on NVMe, openssh-client for the launcher on several nodes.
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        g++ git libaio-dev ninja-build openssh-client python3 python3-dev python3-venv && \
    rm -rf /var/lib/apt/lists/*

# The distribution's own Python takes no packages from pip.
ENV VIRTUAL_ENV=/opt/llava-lite PATH=/opt/llava-lite/bin:${PATH} PIP_NO_CACHE_DIR=1
RUN python3 -m venv "$VIRTUAL_ENV"

WORKDIR /workspace
# torch alone first: it is the largest layer and changes least.
COPY constraints.txt ./
RUN pip install torch -c constraints.txt ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"}

COPY . .
RUN pip install -e ".[$EXTRAS]" -c constraints.txt
RUN if [ -n "$KERNELS" ]; then pip install $KERNELS -c constraints.txt; fi
RUN if [ "$FLASH_ATTN" = 1 ]; then MAX_JOBS="$MAX_JOBS" pip install flash-attn --no-build-isolation; fi

# Ends the build where torch and the image's compiler are of different CUDA versions.
RUN python scripts/lib/check_cuda.py
CMD ["bash"]
