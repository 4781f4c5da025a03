"""What the tests share: a tokenizer of 512 tokens, trained in a blink on the story that lies beside this file."""

import atexit
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from nanochat.tokenizer import RustBPETokenizer

# Compared with references to many digits, so in float32 on every machine; a test of another precision asks for it.
os.environ["NANOCHAT_PRECISION"] = "float32"
# No progress of long loops between the lines of pytest, here and in the processes that tests start.
os.environ["TQDM_DISABLE"] = "1"
# Tiny models gain nothing from threads, and a process without a thread pool can be forked (test_distributed.py).
torch.set_num_threads(1)


@atexit.register
def end_in_silence():
    """Triton's bindings print pages about leaks when Python ends; pytest's summary is what should stand last."""
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@pytest.fixture(scope="session")
def story():
    """A short original text: prose with contractions and numbers, a few lines of code, some German and Greek."""
    return (Path(__file__).parent / "story.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def tokenizer(story):
    """503 ordinary and 9 special tokens. Shared by all tests: nothing may change it."""
    return RustBPETokenizer.train_from_iterator(iter([story]), vocab_size=512)


@pytest.fixture(scope="session")
def trained_dir(tmp_path_factory, tokenizer):
    """base/: what all four stages leave after four steps each; mirror/: the data they read. Copy what you change."""
    from dev import gen_synthetic_data
    from tests.stages import STAGES, run_stage
    root = tmp_path_factory.mktemp("trained")
    gen_synthetic_data.write_mirror(root / "mirror", seed=1, scale=0.008)
    tokenizer.save(root / "base" / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(root / "base"))
        patch.setenv("NANOCHAT_DATA_DIR", str(root / "mirror"))
        for stage in STAGES:
            run_stage(stage)
    return root


@pytest.fixture
def base_dir(trained_dir, tmp_path, monkeypatch):
    """$NANOCHAT_BASE_DIR: a copy, for one test, of what all four stages left; and their mirror."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(shutil.copytree(trained_dir / "base", tmp_path / "base")))
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(trained_dir / "mirror"))
    return tmp_path / "base"


# -----------------------------------------------------------------------------
# Exports: tests/exports.py


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers", minversion="5.0", reason="needs transformers 5.0: uv sync --group dev")


@pytest.fixture(scope="session")
def small_tokenizer(story):
    from tests import exports
    return exports.small_tokenizer(story)


@pytest.fixture(scope="session")
def small_models():
    from tests import exports
    return exports.small_models()


@pytest.fixture(scope="session")
def small_base(tmp_path_factory, small_models, small_tokenizer):
    """A base directory with the checkpoints of exports.py."""
    from tests import exports
    return exports.save_checkpoints(tmp_path_factory.mktemp("export"), small_models, small_tokenizer)


@pytest.fixture
def export(small_base):
    """export(out, **settings): the folder that export_hf writes of one of these checkpoints."""
    from tests import exports
    return partial(exports.export, small_base)
