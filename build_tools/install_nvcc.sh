#!/bin/sh
# Lays nvcc and what it needs, from PyPI, into a folder that serves as CUDA_HOME: install_nvcc.sh FOLDER [PYTHON].
# For images that build wheels and have no CUDA toolkit.
set -eu
folder=$1
python=${2:-python3}
packages=$(mktemp -d)
"$python" -m pip install --quiet --disable-pip-version-check --only-binary=:all: --target "$packages" \
  'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cccl==13.0.*'
rm -rf "$folder"
mkdir -p "$(dirname "$folder")"
mv "$packages/nvidia/cu13" "$folder"
rm -rf "$packages"
# nvcc looks for the runtime in lib64, the packages hold it in lib.
ln -sfn lib "$folder/lib64"
"$folder/bin/nvcc" --version
