# shellcheck shell=bash
# Sourced by the scripts beside it, from the repository's root: uses the active virtual environment, or makes and uses
# .venv here. A machine without a GPU is spared the CUDA packages when a CPU build of torch is on hand to pip (its
# PIP_INDEX_URL, PIP_FIND_LINKS and the like are honoured as always).

if [ -z "${VIRTUAL_ENV:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    echo "making a virtual environment in .venv"
    "${PYTHON:-python3}" -m venv .venv
  fi
  # shellcheck disable=SC1091
  . .venv/bin/activate
fi

# install_package EXTRAS: install this checkout unless it was installed from the same setup.cfg before.
install_package() {
  local stamp="$VIRTUAL_ENV/.opd_ds_installed${1//[^a-z]/}"
  if [ ! -f "$stamp" ] || ! cmp -s setup.cfg "$stamp"; then
    echo "installing opd-ds$1 (a few minutes the first time)"
    # Python compiles what it imports, in less time than pip takes for everything, where it may keep the result.
    local compile=--no-compile
    [ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || compile=--compile
    python -m pip install --quiet --disable-pip-version-check "$compile" --editable ".$1"
    cp setup.cfg "$stamp"
  fi
}

# Without an accelerator DeepSpeed runs on the CPU; each process gets its share of the cores.
if ! command -v nvidia-smi >/dev/null 2>&1 && ! command -v rocm-smi >/dev/null 2>&1; then
  export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
  cores=$(nproc)
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 2 ? cores / 2 : 1))}"
fi
