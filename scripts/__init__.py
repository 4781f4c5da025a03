"""One script for each stage. They import nanochat before torch (see nanochat/__init__.py)."""

import nanochat  # noqa: F401
