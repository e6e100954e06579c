# Sourced by the other scripts: goes to the repository root, makes .venv and installs what is missing.
# Needs Python 3.11 or newer, and a C++ compiler (deepspeed builds a small op at the first launch).
caller=$PWD
# A path as it was meant where the script was called: from there if something is there, else from here.
from_caller() {
  if [ -e "$caller/$1" ]; then realpath "$caller/$1"; else echo "$1"; fi
}
# torchrun and accelerate kill ranks 30 s after a request to stop; a step and a save may take longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
# GradCache runs two shapes of forward pass: without this a GPU's memory falls into pieces.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
# Where this is set every rank would compile torch and transformers anew, for half a minute.
unset PYTHONDONTWRITEBYTECODE
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for python in "${PYTHON:-python3.11}" python3; do
  command -v "$python" >/dev/null && break
done
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: Python 3.11 or newer is needed, and $python is $("$python" --version 2>&1); set PYTHON" >&2
  exit 2
fi
if ! command -v g++ >/dev/null; then
  echo "error: no g++ on this machine; install a C++ compiler (Debian: apt-get install g++)" >&2
  exit 2
fi
[ -d .venv ] || "$python" -m venv .venv
source .venv/bin/activate
wanted=$(cat requirements.txt | cksum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  echo "installing requirements.txt into .venv (once; some minutes)"
  # torch first: a build of it that is already on the machine is then kept.
  python -m pip install --quiet --disable-pip-version-check "$(grep ^torch== requirements.txt)"
  python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  echo "$wanted" >.venv/installed
fi
