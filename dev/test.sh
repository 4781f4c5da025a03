#!/usr/bin/env bash
# All checks, on a bare machine: set-up, ruff, the Rust crate, then pytest, whose summary comes last.
#   bash dev/test.sh              the fast tests (minutes)
#   bash dev/test.sh tests/ -v    other arguments for pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source dev/setup.sh cpu --group dev

ruff check .
uv lock --check
if ! command -v cargo > /dev/null; then
    echo "cargo is missing: the Rust checks are skipped (https://rustup.rs installs it)"
else
    cargo fmt --check --manifest-path rustbpe/Cargo.toml
    cargo clippy --quiet --all-targets --manifest-path rustbpe/Cargo.toml -- -D warnings
    cargo test --quiet --manifest-path rustbpe/Cargo.toml
fi
if [ $# -eq 0 ]; then set -- tests/ -q -m "not slow" --durations=10; fi
python -m pytest "$@"
