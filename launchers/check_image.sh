#!/usr/bin/env bash
# The last step of a container image's build: the command starts, and DeepSpeed's ops can be compiled for this torch.
set -euo pipefail
opd-ds recipes >/dev/null
c++ --version >/dev/null
python - <<'PYTHON'
import os
import sys

import torch

toolkit, ours = os.environ.get("CUDA_VERSION", ""), torch.version.cuda or ""  # NVIDIA's images set CUDA_VERSION
if toolkit.split(".")[0] != ours.split(".")[0]:
    sys.exit(f"CUDA toolkit {toolkit or '-'} and torch {torch.__version__} (CUDA {ours or '-'}): DeepSpeed compiles only "
             "with the same major version; build with another --build-arg BASE=nvidia/cuda:...-devel-ubuntu24.04")
PYTHON
echo "opd-ds $(python -c 'import opd_ds; print(opd_ds.__version__)') is installed"
