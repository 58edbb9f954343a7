#!/bin/bash
# Installs what LateMask needs into a container image: image.sh REQUIREMENTS. Dockerfile and latemask.def run it.
# LateMask itself is not in the image: a job reads the code that is frozen in its RUN/slurm.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive DS_BUILD_OPS=0

apt-get update
apt-get install --yes --no-install-recommends g++ # torch.compile and DeepSpeed build kernels when they start
rm -rf /var/lib/apt/lists/*

# torch first, as DeepSpeed's build would otherwise fetch another one; the plain wheel brings CUDA's libraries.
python3 -m pip install --no-cache-dir "$(grep '^torch==' "$1")"
python3 -m pip install --no-cache-dir --requirement "$1"
ldconfig # mpich's wheel puts libmpi among the system's libraries
DS_ACCELERATOR=cpu python3 -c 'import deepspeed, megatron.core, mpi4py.MPI, sentencepiece, tokenizers, torch'
