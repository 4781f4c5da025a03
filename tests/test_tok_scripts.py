"""tok_train and tok_eval: from --help to whole runs on a tiny corpus."""

import hashlib
import json
import os
import runpy
import sys
from itertools import islice

import pytest

from nanochat.common import UserError
from nanochat.dataset import iter_texts
from nanochat.split_patterns import SPLIT_PATTERNS
from nanochat.tokenizer import HuggingFaceTokenizer, RustBPETokenizer, get_tokenizer
from scripts import tok_eval, tok_train

MIRROR = os.environ.get("NANOCHAT_DATA_DIR")


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    """Artifacts go here; neither a mirror nor a cache of tiktoken's is in sight."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    return tmp_path / "base"


@pytest.fixture
def corpus(tmp_path, story):
    """A folder with one .jsonl file: each paragraph of the story a document."""
    (tmp_path / "corpus").mkdir()
    with open(tmp_path / "corpus" / "story.jsonl", "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": paragraph}) + "\n" for paragraph in story.split("\n\n") * 5)
    return str(tmp_path / "corpus")


def run_as_command(monkeypatch, script, *args):
    """What `python -m scripts.<script> ...` does, without the seconds that a new process takes."""
    monkeypatch.setattr(sys, "argv", [script, *args])
    monkeypatch.delitem(sys.modules, f"scripts.{script}", raising=False)
    runpy.run_module(f"scripts.{script}", run_name="__main__")


# -----------------------------------------------------------------------------
# tok_train


@pytest.mark.parametrize("script, knob", [("tok_train", "--vocab_size=65536"), ("tok_eval", "--max_chars=1000000")])
def test_help_lists_the_settings(monkeypatch, capsys, script, knob):
    with pytest.raises(SystemExit) as done:
        run_as_command(monkeypatch, script, "--help")
    assert done.value.code == 0
    assert knob in capsys.readouterr().out


def test_caps_cut_documents_and_the_whole():
    counts = {"documents": 0, "characters": 0, "bytes": 0}
    texts = tok_train.cap_texts(iter(["a" * 10, "é" * 3, "b" * 10, "never read"]), 12, 5, counts)
    assert list(texts) == ["aaaaa", "ééé", "bbbb"]
    assert counts == {"documents": 3, "characters": 12, "bytes": 15}


def test_a_doc_cap_of_minus_one_keeps_whole_documents():
    counts = {"documents": 0, "characters": 0, "bytes": 0}
    assert list(tok_train.cap_texts(iter(["a" * 20_000]), 10**9, -1, counts)) == ["a" * 20_000]


def test_train_saves_what_the_class_learns_from_the_same_documents(monkeypatch, capsys, base_dir, corpus):
    run_as_command(monkeypatch, "tok_train", f"--data={corpus}", "--vocab_size=400")
    same = RustBPETokenizer.train_from_iterator(iter_texts(corpus, "train"), vocab_size=400)
    assert get_tokenizer().hash() == same.hash()
    assert f"saved: {base_dir / 'tokenizer'} | hash: {same.hash()[:16]}" in capsys.readouterr().out


@pytest.mark.parametrize("trainer", ["rustbpe", "huggingface"])
@pytest.mark.parametrize("split", SPLIT_PATTERNS)
def test_train_takes_each_split_and_saves_its_pattern(monkeypatch, base_dir, corpus, split, trainer):
    run_as_command(monkeypatch, "tok_train", f"--data={corpus}", "--vocab_size=400", f"--split={split}",
                   f"--trainer={trainer}")
    assert get_tokenizer().pattern == SPLIT_PATTERNS[split]
    record, = (json.loads(path.read_text(encoding="utf-8")) for path in (base_dir / "report").glob("*training.json"))
    assert record["config"]["split"] == split


def test_train_refuses_an_unknown_split(monkeypatch, capsys, corpus):
    with pytest.raises(SystemExit):
        run_as_command(monkeypatch, "tok_train", f"--data={corpus}", "--split=gpt5")
    assert "--split=gpt5: need nanochat or gpt4 or qwen" in capsys.readouterr().err


def test_train_reads_another_field_and_names_rows_without_text(monkeypatch, capsys, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"story": "sun and rain " * 20}, {"story": None}, {"story": ""}, {"story": "wind " * 20}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = (f"--data={path}", "--text_field=story", "--vocab_size=300")
    run_as_command(monkeypatch, "tok_train", *flags)
    assert f"rows without text: 2 skipped, first in each file: {path}:2: field story" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_as_command(monkeypatch, "tok_train", *flags, "--strict")
    assert f"error: {path}:2: field story is missing or null" in capsys.readouterr().err


def test_train_records_its_facts(monkeypatch, base_dir, corpus):
    for name, value in {"data": corpus, "vocab_size": 400, "doc_cap": 100}.items():
        monkeypatch.setattr(tok_train, name, value)
    tok_train.main()
    facts, = (json.loads(path.read_text(encoding="utf-8")) for path in (base_dir / "report").glob("*training.json"))
    documents = list(iter_texts(corpus, "train"))
    assert facts["documents"] == len(documents)
    assert facts["characters"] == sum(min(len(document), 100) for document in documents)
    assert facts["vocab size"] == 400 and facts["hash"] == get_tokenizer().hash()
    assert facts["config"]["doc_cap"] == 100


def test_train_with_the_other_library(monkeypatch, corpus):
    for name, value in {"data": corpus, "vocab_size": 400, "trainer": "huggingface"}.items():
        monkeypatch.setattr(tok_train, name, value)
    tok_train.main()
    assert type(get_tokenizer()) is HuggingFaceTokenizer


def test_train_says_when_the_text_is_too_small(monkeypatch, capsys, corpus):
    monkeypatch.setattr(tok_train, "data", corpus)
    tok_train.main()
    assert "less than the 65,536 asked for" in capsys.readouterr().out


@pytest.mark.parametrize("name, value", [("trainer", "sentencepiece"), ("max_chars", 0), ("vocab_size", 100),
                                         ("data", "/nowhere")])
def test_train_refuses_bad_settings_and_writes_nothing(monkeypatch, base_dir, corpus, name, value):
    monkeypatch.setattr(tok_train, "data", corpus)
    monkeypatch.setattr(tok_train, name, value)
    with pytest.raises(UserError, match=str(value)):
        tok_train.main()
    assert not (base_dir / "tokenizer").exists()


# -----------------------------------------------------------------------------
# tok_eval


def test_eval_prints_and_records_every_text(monkeypatch, capsys, base_dir, corpus, tokenizer):
    tokenizer.save(base_dir / "tokenizer")
    run_as_command(monkeypatch, "tok_eval", f"--data={corpus}")
    names = ["English", "code", "maths", "Korean", "corpus, train", "corpus, val"]
    out = capsys.readouterr().out
    assert [line.split("  ")[0] for line in out.splitlines()[2:8]] == names
    assert "skipped GPT-2: absent" in out and "skipped GPT-4: absent" in out
    record, = (json.loads(path.read_text(encoding="utf-8")) for path in (base_dir / "report").glob("*evaluation.json"))
    assert [row["text"] for row in record["tables"]["Bytes per token"]] == names


def test_eval_works_without_a_corpus(capsys, base_dir, tokenizer):
    tokenizer.save(base_dir / "tokenizer")
    tok_eval.main()
    out = capsys.readouterr().out
    assert "Korean" in out and "skipped corpus, train: absent" in out


def test_eval_insists_on_a_corpus_that_was_asked_for(monkeypatch, base_dir, tokenizer):
    tokenizer.save(base_dir / "tokenizer")
    monkeypatch.setattr(tok_eval, "data", "/nowhere")
    with pytest.raises(UserError, match="/nowhere"):
        tok_eval.main()


def test_eval_without_a_tokenizer_names_the_command_that_trains_one():
    with pytest.raises(UserError, match=r"python -m scripts\.tok_train"):
        tok_eval.main()


def test_comparison_by_hand():
    by_bytes = [list(b"abcd"), list("éé".encode())]  # 4 + 4 bytes
    by_characters = [list("abcd"), list("éé")]       # 4 + 2 characters
    rows = tok_eval.compare({"x": ["abcd", "éé"]}, {"ours": lambda _: by_characters, "theirs": lambda _: by_bytes})
    assert rows == [{"text": "x", "bytes": 8, "ours": 8 / 6, "theirs": 1.0, "vs theirs": "+25.0%"}]
    assert tok_eval.format_table(rows) == ["text  bytes  ours  theirs  vs theirs",
                                           "x         8  1.33    1.00     +25.0%"]


def cached(tmp_path, data):
    """A file in tiktoken's cache as tiktoken would have left it; returns {address: true sha256 of b"whole"}."""
    address = "https://example.org/ranks"
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / hashlib.sha1(address.encode()).hexdigest()).write_bytes(data)
    return {address: hashlib.sha256(b"whole").hexdigest()}


def never(name):
    raise AssertionError(f"tiktoken was asked for {name}, and would use the network")


def test_a_reference_in_the_cache_is_used(tmp_path):
    files = cached(tmp_path, b"whole")
    assert tok_eval.find_reference("gpt2", files, get_encoding=lambda name: f"<{name}>") == ("<gpt2>", None)


def test_a_damaged_reference_is_skipped_and_left_alone(tmp_path):
    files = cached(tmp_path, b"half")
    assert tok_eval.find_reference("gpt2", files, get_encoding=never) == (None, "damaged")
    assert [path.read_bytes() for path in (tmp_path / "cache").iterdir()] == [b"half"]


@pytest.mark.parametrize("cache_dir", ["", "/nowhere"])
def test_without_a_cache_no_reference_is_asked_for(monkeypatch, cache_dir):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache_dir)
    for name, files in tok_eval.REFERENCES.values():
        assert tok_eval.find_reference(name, files, get_encoding=never) == (None, "absent")


# -----------------------------------------------------------------------------
# Real text


@pytest.mark.slow
@pytest.mark.skipif(not MIRROR, reason="needs real text: NANOCHAT_DATA_DIR points to no local mirror")
def test_both_classes_encode_real_text_alike(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DATA_DIR", MIRROR)
    ours = RustBPETokenizer.train_from_iterator(islice(iter_texts(None, "train"), 2000), vocab_size=16_384)
    texts = list(islice(iter_texts(None, "val"), 100))
    assert HuggingFaceTokenizer(ours.mergeable).encode(texts) == ours.encode(texts)
    assert [ours.decode(ids) for ids in ours.encode(texts)] == texts
