# opd_ds for machines with NVIDIA GPUs:
#     docker build -t opd_ds .
#     docker run --gpus all --ipc host --ulimit memlock=-1 -v "$PWD:/runs" -w /runs opd_ds opd-ds doctor
# --ipc host: ranks of one machine talk through /dev/shm, of which Docker gives 64 MiB. apptainer.def does the same steps.

# The CUDA toolkit is there for DeepSpeed's ops, which are compiled at first use; its major version must be torch's.
ARG BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04
FROM ${BASE}
ARG EXTRAS=plots,ocr,vlm,serve

# A compiler and libaio for DeepSpeed's ops; InfiniBand's libraries for NCCL; ssh and pdsh for runs with a hostfile.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      python3 python3-dev python3-venv g++ libaio-dev libibverbs1 ibverbs-providers librdmacm1 openssh-client pdsh \
 && rm -rf /var/lib/apt/lists/*
COPY . /opt/opd_ds
RUN python3 -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir "/opt/opd_ds[${EXTRAS}]"
ENV PATH=/opt/venv/bin:$PATH
RUN bash /opt/opd_ds/launchers/check_image.sh
