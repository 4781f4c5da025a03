"""Data sets and how answers to them are judged. They import nanochat before torch."""

import nanochat  # noqa: F401
