# Sourced by the run scripts: uv, the virtual environment with torch, and the rustbpe extension built in it.
#   source dev/setup.sh cpu|gpu [more arguments of uv sync]
# Everything the project needs is installed here, uv itself when it is missing. Nothing of the user's is changed:
# NANOCHAT_BASE_DIR and the other variables keep the values they have.

if ! command -v uv > /dev/null; then
    # the official installer where its site is reached, else pip, on systems that manage their Python themselves, too:
    # uv is one binary without dependencies
    (set -o pipefail; curl -LsSf --connect-timeout 10 https://astral.sh/uv/install.sh | sh) \
        || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet uv
    export PATH="$HOME/.local/bin:$PATH"
fi
if ! command -v cc > /dev/null; then  # rustbpe is linked with it
    echo "error: no C compiler (cc) is installed" >&2
    echo "hint: sudo apt-get install build-essential, or on a Mac: xcode-select --install" >&2
    return 2
fi
uv sync --inexact --extra "$@"  # inexact: what the user added to the environment stays
source .venv/bin/activate

export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
mkdir -p "$NANOCHAT_BASE_DIR"
