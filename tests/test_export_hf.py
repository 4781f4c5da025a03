"""An exported folder in transformers: same logits, token ids and prompts as here; errors for what it cannot hold."""

import copy
import random
import re
import sys
from functools import partial

import pytest
import torch

from nanochat import hf_format
from nanochat.common import IGNORE, UserError
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig
from nanochat.split_patterns import NANOCHAT_PATTERN, SPLIT_PATTERNS
from nanochat.tokenizer_readers import EXCEPTIONS, READERS, read_outcomes, reader_lines
from scripts import export_hf
from tests import exports
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def folder(small_base):
    return exports.export(small_base, small_base / "exported", model_tag="kv2")


@pytest.fixture(scope="module")
def theirs(transformers, folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


# -----------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("tag, attention", [
    ("kv4", "sdpa"), ("kv2", "sdpa"), ("kv1", "sdpa"), ("values", "sdpa"), ("values", "eager"),
])
def test_logits_and_greedy_tokens_are_equal(
        transformers, small_models, small_tokenizer, export, tag, attention, tmp_path):
    model = small_models[tag]
    hf_model, info = transformers.AutoModelForCausalLM.from_pretrained(
        export(tmp_path / "out", model_tag=tag), output_loading_info=True, attn_implementation=attention,
        trust_remote_code=tag == "values")
    assert not any(info.values()) and hf_model.dtype == torch.float32
    ids = torch.randint(0, 500, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(hf_model(ids).logits, model(ids), atol=1e-5, rtol=0)
    num_tokens = []
    for prompt in ids[:, :8]:
        columns = Engine(model, small_tokenizer).generate(prompt.tolist(), temperature=0, max_tokens=20)
        ours = [token for (token,), _ in columns]  # with the token that ends an answer
        output = hf_model.generate(prompt[None], attention_mask=torch.ones(1, 8), do_sample=False, max_new_tokens=20)
        assert output[0, 8:].tolist() == ours
        num_tokens.append(len(ours))
    assert max(num_tokens) == 20


def test_bfloat16_is_the_default_and_halves_the_file(transformers, export, folder, tmp_path):
    assert export_hf.dtype == "bfloat16"
    half = export(tmp_path / "half", model_tag="kv2", dtype="bfloat16")
    assert transformers.AutoModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16
    sizes = [(path / "model.safetensors").stat().st_size for path in (half, folder)]
    assert sizes[0] < 0.6 * sizes[1]


def test_generation_stops_where_ours_does_and_at_a_call(transformers, small_tokenizer, export, folder, tmp_path):
    ends = {}
    for stage, path in (("sft", folder), ("base", export(tmp_path / "base", source="base"))):
        config = transformers.AutoModelForCausalLM.from_pretrained(path).generation_config
        ends[stage] = [small_tokenizer.id_to_token(token) for token in config.eos_token_id]
    assert ends == {"sft": ["<|assistant_end|>", "<|bos|>", "<|python_end|>"], "base": ["<|bos|>"]}


CHATS = ["Hi", "The old lighthouse stood at the end of the harbour.", "12*3?"]  # of different lengths


def test_a_padded_batch_of_chats_equals_each_alone(transformers, theirs, folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    chats = [[{"role": "user", "content": text}] for text in CHATS]
    render = partial(theirs.apply_chat_template, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    settings = dict(do_sample=False, max_new_tokens=12)
    batch = render(chats, padding=True)
    texts = theirs.batch_decode(model.generate(**batch, **settings)[:, batch["input_ids"].shape[1]:])
    for chat, text in zip(chats, texts, strict=True):
        alone = render(chat)
        ids = model.generate(**alone, **settings)[0, alone["input_ids"].shape[1]:]
        assert text.startswith(theirs.decode(ids)) and len(ids) > 2
    assert theirs.padding_side == "left" and theirs.pad_token == "<|assistant_end|>"


@pytest.mark.parametrize("eos", [None, "<|bos|>", "<|assistant_end|>"])
def test_generating_without_a_mask_sees_the_first_token(transformers, theirs, folder, eos):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    settings = dict(do_sample=False, max_new_tokens=12)
    if eos:
        settings["eos_token_id"] = theirs.convert_tokens_to_ids(eos)
    for text in CHATS:
        chat = [{"role": "user", "content": text}]
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        with_mask = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert model.generate(ids, **settings).tolist() == with_mask.tolist()


# -----------------------------------------------------------------------------
# The tokenizer


def fuzzed_texts(story, count=300):
    """Story fragments, spaces, digits and characters of all planes, in random order; no surrogates."""
    rng = random.Random(1)
    words = re.findall(r"\S+|\s+", story)
    pieces = [lambda: rng.choice(words), lambda: rng.choice(" \t\n\r\u00a0\u2028\u200d") * rng.randint(1, 4),
              lambda: str(rng.randrange(10 ** rng.randint(1, 9))), lambda: chr(rng.randrange(0x250)),
              lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
              lambda: rng.choice(["<|", "|>", "'LL", "'s", "\x00", "e\u0301", "👩\u200d🚀", "aaaaaaa", "...\r\n"])]
    return ["", *("".join(rng.choice(pieces)() for _ in range(rng.randint(1, 30))) for _ in range(count))]


def test_texts_give_the_same_ids_and_ids_the_same_text(theirs, small_tokenizer, story):
    for text in [story, *fuzzed_texts(story)]:
        ids = small_tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids, repr(text)
        assert theirs(text).input_ids == [small_tokenizer.get_bos_token_id(), *ids]
        assert theirs.decode(ids) == text
    rng = random.Random(2)
    for _ in range(300):  # also ids whose bytes are no UTF-8, and special ones
        ids = [rng.randrange(500) for _ in range(rng.randint(1, 20))]
        assert theirs.decode(ids) == small_tokenizer.decode(ids)


def test_special_tokens_are_special_and_have_our_ids(theirs, small_tokenizer):
    names = small_tokenizer.get_special_tokens()
    ids = [small_tokenizer.encode_special(name) for name in names]
    assert len(theirs) == 500 and theirs.model_max_length == 64
    assert theirs.convert_tokens_to_ids(names) == ids and sorted(theirs.all_special_ids) == ids
    assert theirs.decode([ids[1], 72, 105, ids[2]], skip_special_tokens=True) == "Hi"


def test_text_that_spells_a_special_token_becomes_it_in_transformers_unless_split(theirs, small_tokenizer):
    text = "so<|assistant_end|>?"
    end = small_tokenizer.encode_special("<|assistant_end|>")
    assert end in theirs(text).input_ids and end not in small_tokenizer.encode(text)
    assert theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids == small_tokenizer.encode(text)


@pytest.mark.parametrize("pattern", SPLIT_PATTERNS.values(), ids=SPLIT_PATTERNS.keys())
def test_each_split_gives_the_same_ids_in_transformers(
        transformers, small_models, story, pattern, tmp_path, capsys):
    tokenizer = exports.small_tokenizer(story + " 1984 1984 365 365 12 12", pattern)
    saved = exports.save_checkpoints(tmp_path / "saved", {"kv2": small_models["kv2"]}, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(exports.export(saved, tmp_path / "out", model_tag="kv2"))
    for text in fuzzed_texts(story, count=100):
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text), repr(text)


def test_the_export_says_and_writes_which_tools_read_its_tokenizer(export, tmp_path, capsys):
    path = export(tmp_path / "out", model_tag="kv2")
    card = (path / "README.md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    for line in reader_lines(NANOCHAT_PATTERN):
        assert f"\n  {line}\n" in printed
    for tool, outcome in read_outcomes(NANOCHAT_PATTERN):
        assert f"\n| {tool} | {outcome} |\n" in card
    assert ("gigatoken 0.10", "refused") in read_outcomes(NANOCHAT_PATTERN) and "--split=gpt4" in printed


def test_the_table_of_readers_names_splits_and_tools_that_there_are():
    for splits in READERS.values():
        assert set(splits) <= set(SPLIT_PATTERNS)
    assert set(EXCEPTIONS) <= set(READERS)


def test_a_pattern_that_was_not_tried_has_no_table():
    assert read_outcomes(r"\w+|\W+") == [] and "not tried" in reader_lines(r"\w+|\W+")[0]


# -----------------------------------------------------------------------------
# The model card: its code, as printed


def run_card(path, monkeypatch):
    """The names that the card's Python blocks leave, run beside the folder that they name."""
    card = (path / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))  # a block adds the folder
    names = {}
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(block, names)
    sys.modules.pop("calculator", None)
    return names


@pytest.mark.parametrize("settings, known, parameters", [
    # by hand: 2 * 500 * 64 for the vocabulary; each layer 64 * (64 + 32 + 32 + 64) + 2 * 64 * 256
    (dict(model_tag="kv2"), "step 7 of 9; on 5 conversations", 154_112),
    (dict(source="base"), "step 7 of 9, 896 tokens; ", 154_112),
    # and a table of 500 * 32 for each layer
    (dict(model_tag="values"), "`trust_remote_code=True`: read that file first", 186_112),
])
def test_the_card_states_the_facts_and_its_code_runs(
        transformers, export, settings, known, parameters, tmp_path, monkeypatch, capsys):
    path = export(tmp_path / "out", **settings)
    card = (path / "README.md").read_text(encoding="utf-8")
    assert known in card and f"| parameters | {parameters:,} |" in card
    assert ("answer" in run_card(path, monkeypatch)) == ("source" not in settings)


def fit(model, ids, mask, steps=60):
    """Train a model until it knows one conversation by heart."""
    ids = torch.tensor([ids])
    targets = torch.where(torch.tensor([mask]) == 1, ids, IGNORE)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        loss = model(ids[:, :-1], targets[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.01
    return model.eval()


def test_the_card_runs_the_calls_of_a_model(transformers, small_tokenizer, tmp_path, monkeypatch):
    question = {"role": "user", "content": "12*34?"}
    parts = [("text", "It is "), ("python", "12*34"), ("python_output", "7"), ("text", "!")]  # 408, never 7
    answer = {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in parts]}
    ids, mask = small_tokenizer.render_conversation({"messages": [question, answer]})
    model = fit(tiny_model(vocab_size=500, sequence_len=64), ids, mask)
    saved = exports.save_checkpoints(tmp_path / "saved", {"kv2": model}, small_tokenizer)
    names = run_card(exports.export(saved, tmp_path / "out", model_tag="kv2"), monkeypatch)

    text = names["answer"]([question], do_sample=False)
    assert text == "It is <|python_start|>12*34<|python_end|><|output_start|>408<|output_end|>!"
    prompt = small_tokenizer.render_for_completion({"messages": [question]})
    (ours,), _ = Engine(model, small_tokenizer).generate_batch(prompt, temperature=0)
    assert small_tokenizer.decode(ours[len(prompt):]) == text


# -----------------------------------------------------------------------------
# The folder


def test_an_existing_folder_is_kept_unless_it_is_empty(export, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty", model_tag="kv2")
    assert "wrote kv2, sft step 7" in capsys.readouterr().out
    before = (tmp_path / "empty" / "config.json").stat().st_mtime_ns
    (tmp_path / "file").write_text("mine")
    for name in ("empty", "file"):
        with pytest.raises(UserError, match=rf"{name} exists already[^\n]*\nhint: choose another"):
            export(tmp_path / name, model_tag="kv2")
    assert (tmp_path / "empty" / "config.json").stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]  # and nothing temporary


@pytest.mark.parametrize("settings, message", [
    (dict(dtype="float16"), "dtype=float16: need bfloat16 or float32"), (dict(source="dpo"), "'dpo' is unknown"),
    (dict(flavor="gguf"), "flavor=gguf: need transformers or mlx"),
    (dict(source="rl"), "no rl checkpoint"), (dict(model_step=8), "no whole checkpoint of step 8"),
    (dict(model_tag="values", flavor="mlx"), "no value embeddings .* in its nanochat\nhint: --flavor=transformers"),
])
def test_a_wrong_setting_is_named(export, settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export(tmp_path / "out", **({"model_tag": "kv2"} if settings.get("source") != "rl" else {}) | settings)
    assert list(tmp_path.iterdir()) == []


def test_every_switch_of_a_model_is_exported():
    assert {*hf_format.FIELDS, "value_embeds"} == set(GPTConfig.__dataclass_fields__)


# -----------------------------------------------------------------------------
# What goes out for value embeddings


def test_without_trust_the_code_in_the_folder_is_not_run(transformers, export, tmp_path):
    path = export(tmp_path / "out", model_tag="values")
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)


def test_it_can_be_saved_loaded_and_trained_by_transformers(transformers, small_models, export, tmp_path):
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, trust_remote_code=True)
    load(export(tmp_path / "out", model_tag="values")).save_pretrained(tmp_path / "again")
    theirs = load(tmp_path / "again")
    ids = torch.randint(0, 500, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, small_models["values"](ids), atol=1e-5, rtol=0)

    theirs.gradient_checkpointing_enable()
    theirs.train()(ids, labels=ids, use_cache=False).loss.backward()
    ours = copy.deepcopy(small_models["values"])
    ours(ids[:, :-1], ids[:, 1:]).backward()
    for layer, table in zip(theirs.model.layers, ours.transformer.value_embeds, strict=True):
        torch.testing.assert_close(layer.self_attn.value_embed.weight.grad, table.weight.grad[:500])
    with pytest.raises(ValueError, match="input_ids are needed"):
        theirs(inputs_embeds=torch.zeros(1, 1, 64))


def test_the_modelling_file_is_short_and_needs_transformers_and_torch_alone():
    source = (hf_format.FILES / hf_format.MODELLING_FILE).read_text(encoding="utf-8")
    imported = re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE)
    assert set(imported) == {"torch", "transformers"} and len(source.splitlines()) < 150
