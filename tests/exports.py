"""Tiny checkpoints to export, for the tests of the export and of the tools that load it."""

import pytest

from nanochat.checkpoint_manager import CheckpointManager, get_checkpoint_dir
from nanochat.split_patterns import NANOCHAT_PATTERN
from nanochat.tokenizer import RustBPETokenizer
from scripts import export_hf
from tests.tiny import tiny_model

VOCAB_SIZE = 500  # not a multiple of 64: the model has padded rows, which must not be exported


def small_tokenizer(story, pattern=NANOCHAT_PATTERN):
    return RustBPETokenizer.train_from_iterator(iter([story]), vocab_size=VOCAB_SIZE, pattern=pattern)


def small_models():
    """By tag: as many key and value heads as query heads, half as many, one; with value embeddings."""
    sizes = dict(vocab_size=VOCAB_SIZE, sequence_len=64)
    models = {f"kv{n}": tiny_model(**sizes, n_kv_head=n, seed=n) for n in (4, 2, 1)}
    models["values"] = tiny_model(**sizes, n_kv_head=2, value_embeds=True, seed=3)
    return {tag: model.eval() for tag, model in models.items()}


def save_checkpoints(base_dir, models, tokenizer):
    """An SFT checkpoint of each model, and a base checkpoint of kv2."""
    meta = {"iterations": 9, "data": "5 conversations", "settings": {"seed": 1}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
        for tag, model in models.items():
            CheckpointManager(get_checkpoint_dir("sft", tag)).save(7, model, tokenizer=tokenizer, meta=meta)
        CheckpointManager(get_checkpoint_dir("base", "kv2")).save(
            7, models["kv2"], tokenizer=tokenizer, meta={"iterations": 9, "progress": {"tokens": 896}})
    return base_dir


def export(base_dir, out, **settings):
    """The folder that export_hf writes with these settings, float32 unless they say otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
        for name, value in {"out": str(out), "dtype": "float32", **settings}.items():
            patch.setattr(export_hf, name, value)
        export_hf.main()
    return out
