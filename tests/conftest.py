"""What the tests share: a tokenizer of 512 tokens, trained in a blink on the story that lies beside this file."""

from pathlib import Path

import pytest
import torch

from nanochat.tokenizer import RustBPETokenizer

# Tiny models gain nothing from threads, and a process without a thread pool can be forked (test_distributed.py).
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def story():
    """A short original text: prose with contractions and numbers, a few lines of code, some German and Greek."""
    return (Path(__file__).parent / "story.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def tokenizer(story):
    """503 ordinary and 9 special tokens. Shared by all tests: nothing may change it."""
    return RustBPETokenizer.train_from_iterator(iter([story]), vocab_size=512)
