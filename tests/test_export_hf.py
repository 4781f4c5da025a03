"""An exported folder in transformers: same logits, token ids and prompts as here; errors for what it cannot hold."""

import json
import random
import re

import pytest
import torch

from nanochat.checkpoint_manager import CheckpointManager, get_checkpoint_dir
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.tokenizer import RustBPETokenizer
from scripts import export_hf
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", minversion="5.0", reason="needs transformers 5.0: uv sync --group dev")


@pytest.fixture(scope="module")
def small_tokenizer(story):
    """500 tokens, not a multiple of 64: the model has padded rows, which must not be exported."""
    return RustBPETokenizer.train_from_iterator(iter([story]), vocab_size=500)


@pytest.fixture(scope="module")
def models(small_tokenizer):
    """By tag: as many key and value heads as query heads, half as many, one."""
    return {f"kv{n}": tiny_model(vocab_size=500, sequence_len=64, n_kv_head=n, seed=n).eval() for n in (4, 2, 1)}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory, models, small_tokenizer):
    """A base directory with an SFT checkpoint of each model, and a base checkpoint of one."""
    folder = tmp_path_factory.mktemp("export")
    meta = {"iterations": 9, "data": "5 conversations", "settings": {"seed": 1}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        for tag, model in models.items():
            CheckpointManager(get_checkpoint_dir("sft", tag)).save(7, model, tokenizer=small_tokenizer, meta=meta)
        CheckpointManager(get_checkpoint_dir("base", "kv2")).save(
            7, models["kv2"], tokenizer=small_tokenizer, meta={"iterations": 9, "progress": {"tokens": 896}})
    return folder


@pytest.fixture(autouse=True)
def environment(base_dir, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir))


def export(out, **settings):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"out": str(out), "dtype": "float32", **settings}.items():
            patch.setattr(export_hf, name, value)
        export_hf.main()
    return out


@pytest.fixture(scope="module")
def folder(base_dir):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
        return export(base_dir / "exported", model_tag="kv2")


@pytest.fixture(scope="module")
def theirs(transformers, folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


# -----------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("tag", ["kv4", "kv2", "kv1"])
def test_logits_and_greedy_tokens_are_equal(transformers, models, small_tokenizer, tag, tmp_path):
    model = models[tag]
    hf_model, info = transformers.AutoModelForCausalLM.from_pretrained(
        export(tmp_path / "out", model_tag=tag), output_loading_info=True)
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


def test_bfloat16_is_the_default_and_halves_the_file(transformers, folder, tmp_path):
    assert export_hf.dtype == "bfloat16"
    half = export(tmp_path / "half", model_tag="kv2", dtype="bfloat16")
    assert transformers.AutoModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16
    sizes = [(path / "model.safetensors").stat().st_size for path in (half, folder)]
    assert sizes[0] < 0.6 * sizes[1]


def test_generation_stops_where_ours_does(transformers, small_tokenizer, folder, tmp_path):
    ends = {}
    for stage, path in (("sft", folder), ("base", export(tmp_path / "base", source="base"))):
        config = transformers.AutoModelForCausalLM.from_pretrained(path).generation_config
        ends[stage] = [small_tokenizer.id_to_token(token) for token in config.eos_token_id]
    assert ends == {"sft": ["<|assistant_end|>", "<|bos|>"], "base": ["<|bos|>"]}


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


# -----------------------------------------------------------------------------
# The chat template


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def part(text, kind="text"):
    return {"type": kind, "text": text}


SYSTEM = {"role": "system", "content": " Be kind.\n"}
CALL = assistant([part("12*3 = "), part("12*3", "python"), part("36", "python_output"), part("36\n")])
CONVERSATIONS = {
    "a question": [user("Who are you?")],
    "white space is kept": [user("\n  {{ 'x' }} <b> &amp; \t\n")],
    "empty": [user("")],
    "a system message": [SYSTEM, user("Hi")],
    "a system message and turns": [SYSTEM, user("Hi"), assistant("Hello."), user("12*3?"), CALL, user("Σ, 東京?")],
    "ends with the assistant": [user("12*3?"), CALL],
    "system, ends with the assistant": [SYSTEM, user("a"), assistant("b")],
    "parts": [{"role": "system", "content": [part("Be"), part(" kind.")]}, user([part("He"), part("llo")])],
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_the_template_gives_the_same_ids_as_our_renderers(theirs, small_tokenizer, messages):
    conversation = {"messages": messages}
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True).input_ids
    assert prompt == small_tokenizer.render_for_completion(conversation)
    whole = theirs.apply_chat_template(messages, add_generation_prompt=False).input_ids
    assert whole == small_tokenizer.render_conversation(conversation, max_tokens=None)[0]


@pytest.mark.parametrize("messages", [
    [SYSTEM], [assistant("Hi")], [user("a"), user("b")], [user("a"), SYSTEM],
    [user("a"), {"role": "tool", "content": "b"}], [{"role": "user"}], [user(None)],
    [user([part("1+1", "python")])], [user("a"), assistant([part("b", "image")])],
])
def test_the_template_refuses_what_our_renderers_refuse(theirs, small_tokenizer, messages):
    with pytest.raises(UserError):
        small_tokenizer.render_conversation({"messages": messages})
    with pytest.raises(Exception, match="needs the role|needs a user message|part of this type|not iterable"):
        theirs.apply_chat_template(messages)


# -----------------------------------------------------------------------------
# The folder


def test_the_code_in_the_model_card_runs(transformers, folder, tmp_path, monkeypatch, capsys):
    for path, known in ((folder, "step 7 of 9; on 5 conversations"),
                        (export(tmp_path / "base", source="base"), "step 7 of 9, 896 tokens; ")):
        card = (path / "README.md").read_text(encoding="utf-8")
        # by hand: 2 * 500 * 64 for the vocabulary; each layer 64 * (64 + 32 + 32 + 64) + 2 * 64 * 256
        assert known in card and "| parameters | 154,112 |" in card
        monkeypatch.chdir(path.parent)
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1), {})


def test_an_existing_folder_is_kept_unless_it_is_empty(tmp_path, capsys):
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
    (dict(dtype="float16"), "dtype=float16 is unknown"), (dict(source="dpo"), "'dpo' is unknown"),
    (dict(source="rl"), "no rl checkpoint"), (dict(model_step=8), "no whole checkpoint of step 8"),
])
def test_a_wrong_setting_is_named(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export(tmp_path / "out", **({"model_tag": "kv2"} if settings.get("source") != "rl" else {}) | settings)
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_transformers_cannot_express_is_refused(folder):
    config = {"n_layer": 2, "n_head": 4, "value_embeds": False}
    export_hf.check_expressible(config)  # a switch that is off
    with pytest.raises(UserError, match="cannot express value_embeds=True of this checkpoint"):
        export_hf.check_expressible(config | {"value_embeds": True})
    known = {*export_hf.EXPRESSIBLE, "value_embeds"}
    assert known == set(export_hf.GPTConfig.__dataclass_fields__)  # a new field: express or refuse
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 500
