"""Repackaging keeps every document once and makes shards that the rest of the project reads."""

import json

import pytest

from dev import repackage_data_reference as repackage
from nanochat.common import UserError
from nanochat.dataset import iter_texts


def test_every_document_comes_out_once_in_another_order(tmp_path, monkeypatch):
    texts = [f"document {i} " * 3 for i in range(300)]
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (tmp_path / "raw.jsonl").write_text(lines, encoding="utf-8")
    for name, value in dict(data=str(tmp_path / "raw.jsonl"), out=str(tmp_path / "shards"), shard_chars=2000,
                            row_group_docs=16, shuffle_docs=50, val_docs=20).items():
        monkeypatch.setattr(repackage, name, value)
    repackage.main()
    train, val = (list(iter_texts(str(tmp_path / "shards"), split)) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts) and len(val) == 20
    assert train + val != texts and len(list((tmp_path / "shards").iterdir())) > 3
    with pytest.raises(UserError, match="holds shards already"):
        repackage.main()
