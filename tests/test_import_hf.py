"""Models of transformers as checkpoints: equal there and back, loaded by the other scripts; misfits are refused."""

import json
import re
import sys

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from nanochat import hf_format
from nanochat.checkpoint_manager import CheckpointManager, get_checkpoint_dir, load_checkpoint
from nanochat.common import UserError
from nanochat.split_patterns import SPLIT_PATTERNS
from nanochat.tokenizer import SPECIAL_TOKENS
from scripts import chat_cli, import_hf
from tests import exports
from tests.loopback import FaultServer
from tests.stages import run_stage
from tests.tiny import tiny_model

FOREIGN_PATTERN = r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
FOREIGN_TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'user' %}<|user_start|>{{ message['content'] }}<|user_end|>{% endif %}
{% if message['role'] == 'assistant' %}<|assistant_start|>{{ message['content'] }}<|assistant_end|>{% endif %}
{% endfor %}{% if add_generation_prompt %}<|assistant_start|>{% endif %}""".replace("\n", "")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Another base directory, without checkpoints."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def run_import(model, monkeypatch, **settings):
    for name, value in {"model": str(model), "stage": "sft", **settings}.items():
        monkeypatch.setattr(import_hf, name, value)
    import_hf.main()


# -----------------------------------------------------------------------------
# There and back


@pytest.mark.parametrize("settings", [
    dict(model_tag="kv4"), dict(model_tag="kv1"), dict(model_tag="values"), dict(model_tag="kv2", flavor="mlx"),
    dict(model_tag="kv2", dtype="bfloat16"), dict(source="base"),
], ids=str)
def test_an_imported_model_is_exported_to_the_same_files(export, here, settings, tmp_path, monkeypatch, capsys):
    first = export(tmp_path / "first", **settings)
    stage = settings.get("source", "sft")
    run_import(first, monkeypatch, stage=stage)
    assert f"parameters, as the {stage} model first to {here}" in capsys.readouterr().out
    again = exports.export(here, tmp_path / "again", **settings | {"model_tag": "first"})
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    for name in names:
        if name != "README.md":
            assert (first / name).read_bytes() == (again / name).read_bytes(), name
    assert "| origin | imported from first |" in (again / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("pattern", SPLIT_PATTERNS.values(), ids=SPLIT_PATTERNS.keys())
def test_a_tokenizer_of_each_split_comes_back(small_models, story, here, pattern, tmp_path, monkeypatch, capsys):
    tokenizer = exports.small_tokenizer(story, pattern)
    saved = exports.save_checkpoints(tmp_path / "saved", {"kv2": small_models["kv2"]}, tokenizer)
    run_import(exports.export(saved, tmp_path / "out", model_tag="kv2"), monkeypatch, model_tag="mine")
    _, loaded, _ = load_checkpoint("sft", "cpu", "mine")
    assert loaded.pattern == pattern and loaded.hash() == tokenizer.hash()


@pytest.mark.parametrize("stage", ["base", "mid", "sft", "rl"])
def test_it_is_a_checkpoint_of_any_stage(small_models, small_tokenizer, export, here, stage, tmp_path, monkeypatch):
    run_import(export(tmp_path / "out", model_tag="kv2"), monkeypatch, stage=stage, model_tag="mine")
    loaded, tokenizer, _ = load_checkpoint(stage, "cpu", "mine")
    ids = torch.randint(0, 500, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(ids), small_models["kv2"](ids))
    assert tokenizer.hash() == small_tokenizer.hash()


def test_a_second_import_moves_the_first_one_aside(export, here, tmp_path, monkeypatch, capsys):
    path = export(tmp_path / "out", model_tag="kv2")
    run_import(path, monkeypatch)
    run_import(path, monkeypatch)
    assert "the checkpoints of an earlier out are now in" in capsys.readouterr().out
    assert CheckpointManager(get_checkpoint_dir("sft", "out.old1")).steps() == [0]


def test_the_terminal_and_further_training_take_it(base_dir, tmp_path, monkeypatch, capsys):
    """base_dir: what all four stages left."""
    path = exports.export(base_dir, tmp_path / "out", source="mid")
    run_import(path, monkeypatch, stage="mid", model_tag="mine")
    run_stage("sft", model_tag="mine")
    assert CheckpointManager(get_checkpoint_dir("sft", "mine")).steps() == [2, 4]
    monkeypatch.setattr(sys, "argv", ["chat_cli", "-i", "mid", "-g", "mine", "-p", "Hi", "-n", "4"])
    chat_cli.main()
    with pytest.raises(UserError, match="holds a model alone and cannot be resumed"):
        run_stage("mid", model_tag="mine", resume_from_step=0)


# -----------------------------------------------------------------------------
# Models of others


@pytest.fixture(scope="module")
def foreign(transformers, tmp_path_factory, story):
    """A model and a tokenizer made by transformers and tokenizers: other pattern, padded rows, weights in two files."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(FOREIGN_PATTERN), behavior="isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([story], tokenizers.trainers.BpeTrainer(vocab_size=391, initial_alphabet=alphabet))
    core.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|bos|>", eos_token="<|assistant_end|>", chat_template=FOREIGN_TEMPLATE)
    torch.manual_seed(1)
    config = transformers.NanoChatConfig(
        vocab_size=448, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2)
    model = transformers.NanoChatForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("foreign") / "model"
    tokenizer.save_pretrained(path)
    model.save_pretrained(path, max_shard_size="150KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path, model, tokenizer


def test_a_model_of_another_maker_gives_the_same_logits_and_ids(foreign, here, story, monkeypatch, capsys):
    path, theirs, their_tokenizer = foreign
    run_import(path, monkeypatch, model_tag="mine")
    out = capsys.readouterr().out
    assert "note: its norms add 1e-06, ours 1.2e-07: logits differ slightly\n" in out
    assert re.findall("writes (.*) in another way", out) == ["a system message", "calls of the calculator"]
    ours, tokenizer, _ = load_checkpoint("sft", "cpu", "mine")
    assert tokenizer.get_vocab_size() == ours.config.vocab_size == 400
    assert tokenizer.encode(story) == their_tokenizer(story, add_special_tokens=False)["input_ids"]
    ids = torch.randint(0, 400, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits[..., :400], atol=1e-4, rtol=0)


def test_a_model_of_the_hub_is_downloaded(export, here, tmp_path, monkeypatch):
    from huggingface_hub import constants

    path = export(tmp_path / "out", model_tag="kv2")
    names = sorted(file.name for file in path.iterdir())
    commit = "c" * 40
    files = {f"/some/model/resolve/main/{name}": (path / name).read_bytes() for name in names}
    facts = {"id": "some/model", "sha": commit, "siblings": [{"rfilename": name} for name in names]}
    tree = [{"type": "file", "path": name, "size": (path / name).stat().st_size, "oid": "1" * 40} for name in names]
    files["/api/models/some/model/revision/main"] = json.dumps(facts).encode()
    files["/api/models/some/model/tree/main"] = json.dumps(tree).encode()  # asked by newer libraries
    with FaultServer(files, hub=True) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        run_import("some/model", monkeypatch)
        asked = {path for _, path, _ in server.requests}
        with pytest.raises(UserError, match="not found"):
            run_import("some/other", monkeypatch)
    assert load_checkpoint("sft", "cpu", "model")[2]["imported_from"] == "some/model"
    assert "/some/model/resolve/main/model.safetensors" in asked
    assert "/some/model/resolve/main/README.md" not in asked


# -----------------------------------------------------------------------------
# What is refused


def change_json(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def set_config(**fields):
    return lambda folder: change_json(folder / "config.json", lambda content: content.update(fields))


def set_tokenizer(change):
    return lambda folder: change_json(folder / "tokenizer.json", change)


def drop_merges(content):
    """Some tokens are never reached by merges."""
    content["model"]["ignore_merges"] = False
    del content["model"]["merges"][-50:]


def swap_ids(content):
    """Two ordinary tokens change places, so that one comes before its parts."""
    vocab = content["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[256], sorted(vocab, key=vocab.get)[-1]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.fc1.weight"]
    save_file(tensors, folder / "model.safetensors")


def cut_weights(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])


def change_template(folder):
    template = hf_format.chat_template().replace("{{- bos_token -}}", "{{- bos_token ~ ' ' -}}")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


@pytest.mark.parametrize("change, message", [
    (set_config(model_type="llama"), "model_type 'llama', needed: 'nanochat'"),
    (set_config(final_logit_softcapping=None), "final_logit_softcapping None, needed: 15.0"),
    (set_config(num_attention_heads=3, head_dim=21, num_key_value_heads=None), "does not fit: n_embd=64, n_head=3"),
    (set_config(hidden_act="gelu"), "hidden_act 'gelu', needed: 'relu2'"),
    (set_config(rope_parameters={"rope_type": "default", "rope_theta": 500.0}), "rope_theta': 500.0.*needed: .*10000"),
    (set_config(rms_norm_eps=0.01), "rms_norm_eps 0.01, needed: at most 1e-05"),
    (set_config(intermediate_size=100), "intermediate_size 100, needed: 256"),
    (set_config(num_hidden_layers=None), "needs a whole number above 0 for num_hidden_layers"),
    (set_config(num_hidden_layers=3), "tensor model.layers.2.* is missing"),
    (set_config(num_key_value_heads=4), "k_proj.weight has the shape .32, 64., by config.json it needs .64, 64."),
    (set_config(vocab_size=300), "500 tokens, but a model of 300"),
    (set_tokenizer(lambda content: content.update(normalizer={"type": "NFC"})), "is of another kind, needed: BPE"),
    (set_tokenizer(lambda content: content["added_tokens"].pop()), "lacks the special tokens <.output_end.>"),
    (set_tokenizer(drop_merges), "tokenizer.json encodes .* our tokenizer as"),
    (set_tokenizer(swap_ids), "tokenizer.json cannot be used here: .*does not split"),
    (drop_tensor, "tensor model.layers.1.mlp.fc1.weight is missing\nhint: import weights that are whole"),
    (cut_weights, "model.safetensors cannot be read"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors cannot be read"),
    (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json is no JSON"),
    (change_template, r"writes '<.bos.> <.user_start.>.*\n?hint: --stage=base"),
])
def test_what_would_become_another_model_is_refused(small_base, here, change, message, tmp_path, monkeypatch):
    path = exports.export(small_base, tmp_path / "out", model_tag="kv2")
    change(path)
    with pytest.raises(UserError, match=message):
        run_import(path, monkeypatch)
    assert not list(here.rglob("step_*"))


def test_without_a_chat_template_that_is_said_and_a_base_model_needs_none(export, here, tmp_path, monkeypatch, capsys):
    path = export(tmp_path / "out", model_tag="kv2")
    change_template(path)
    run_import(path, monkeypatch, stage="base")
    (path / "chat_template.jinja").unlink()
    change_json(path / "tokenizer_config.json", lambda content: content.pop("chat_template"))
    run_import(path, monkeypatch)
    assert "has no chat template, so whether we write" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "nowhere", "/nowhere", "a/b/c"])
def test_what_is_neither_folder_nor_repository_is_named(here, name, monkeypatch):
    with pytest.raises(UserError, match="neither a folder nor a name on the Hugging Face hub"):
        run_import(name, monkeypatch)


def test_the_config_survives_both_ways():
    config = tiny_model(value_embeds=True, n_kv_head=2).config
    assert hf_format.config_from_hf(hf_format.config_to_hf(config)) == config
    older = hf_format.config_to_hf(config)
    del older["rope_parameters"]
    assert hf_format.config_from_hf(older | {"rope_theta": 10000.0, "num_key_value_heads": 4}).n_kv_head == 4
