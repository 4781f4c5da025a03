"""Every stage in 16 bits, over a whole pass of its data, and when its numbers go wrong."""

import json
import math
import re
import time

import pytest
import torch
from safetensors.torch import load_file

from nanochat import precision
from nanochat.checkpoint_manager import CheckpointManager, get_checkpoint_dir
from nanochat.common import UserError
from nanochat.dataloader import rendered_conversations
from nanochat.gpt import GPT
from nanochat.horizon import shuffled_indices
from nanochat.tokenizer import RustBPETokenizer
from scripts import chat_rl
from tasks.gsm8k import GSM8K
from tasks.mixtures import mid_mixture
from tests.stages import MID, STAGES, curve, run_stage

pytestmark = pytest.mark.usefixtures("base_dir")


def steps_of(stage):
    return [line for line in curve(stage) if "grad_norm" in line]


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_in_16_bits_trains_as_in_32(stage, name, monkeypatch):
    expected = steps_of(stage)  # the first two steps of four have the learning rates of two steps
    monkeypatch.setenv("NANOCHAT_PRECISION", name)
    more = {"num_samples": 8} if stage == "rl" else {}  # few may have one reward by chance, and no gradient
    run_stage(stage, num_iterations=2, eval_every=-1, **more)
    first, second = steps_of(stage)
    assert all(math.isfinite(value) for line in (first, second) for value in line.values())
    _, meta = CheckpointManager(get_checkpoint_dir(stage, "d1")).load_meta()
    assert (meta["scaler"] is not None) == (name == "float16")
    if stage == "rl":  # other rounding, other samples
        assert first["grad_norm"] + second["grad_norm"] > 0
    else:
        assert first["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=0.02)
        assert first["train/loss"] == pytest.approx(expected[0]["train/loss"], rel=0.002)
        assert second["train/loss"] == pytest.approx(expected[1]["train/loss"], rel=0.002)
        assert second["grad_norm"] != expected[1]["grad_norm"]  # it does compute in 16 bits


def test_mid_goes_over_its_mixture_once(tokenizer):
    """The loader's position at the end of the run is the end of epoch 0, within one batch."""
    run_stage("mid", num_iterations=-1, total_batch_size=2048, device_batch_size=32, eval_every=-1)
    step, meta = CheckpointManager(get_checkpoint_dir("mid", "d1")).load_meta()
    assert step == len(steps_of("mid")) > 10
    mixture = mid_mixture(2, MID["spelling_size"], MID["spellingbee_size"])
    lengths = [len(ids) for _, ids in rendered_conversations(mixture, range(len(mixture)), tokenizer)]
    loader = meta["loader"]
    position = loader["epoch"] * sum(lengths) + sum(lengths[: loader["row"]]) + loader["offset"]
    assert position > 2048 and abs(position + 64 * loader["rows_used"] - sum(lengths)) <= 2048


@pytest.mark.parametrize("stage", STAGES)
def test_value_embeddings_have_a_learning_rate_of_their_own_in_every_stage(stage, monkeypatch):
    """As in pretraining, which is where a model gets them."""
    def setup_optimizers(model, *args, **kwargs):
        adam, muon = real(model, *args, **kwargs)
        rates.append([group["initial_lr"] / model.adam_scale for group in adam.param_groups])
        return [adam, muon]
    rates, real = [], GPT.setup_optimizers
    run_stage("base", model_tag="values", value_embeds=True, num_iterations=1, eval_every=-1)
    for name in list(STAGES)[1 : list(STAGES).index(stage)]:
        run_stage(name, model_tag="values", num_iterations=1, eval_every=-1)
    monkeypatch.setattr(GPT, "setup_optimizers", setup_optimizers)
    more = {"value_embeds": True} if stage == "base" else {}
    run_stage(stage, model_tag="values", num_iterations=1, eval_every=-1, embedding_lr=0.2, **more)
    run_stage(stage, model_tag="values", num_iterations=1, eval_every=-1, embedding_lr=0.2, value_lr=0.07, **more)
    assert [values for _, _, values in rates] == [pytest.approx(0.1), pytest.approx(0.07)]
    assert [embedding for _, embedding, _ in rates] == [pytest.approx(0.2)] * 2


def test_rl_asks_every_question_once(monkeypatch):
    def roll_out(engine, task, places):
        asked.extend(shuffled_indices(places, len(task), chat_rl.seed))
        return real(engine, task, places)
    asked, real = [], chat_rl.roll_out
    monkeypatch.setattr(chat_rl, "roll_out", roll_out)
    run_stage("rl", num_iterations=-1, examples_per_step=4, eval_every=-1)  # the last step has one question of 9
    assert sorted(asked) == list(range(len(GSM8K(split="train"))))


def with_a_better_answer(roll_out):
    def changed(*args):
        rows, rewards, advantages = roll_out(*args)
        advantages[0] += 1
        return rows, rewards, advantages
    return changed


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_number_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(stage, what, monkeypatch):
    def diverge(model, *args, **kwargs):
        loss, rows = real(model, *args, **kwargs)
        calls.append(1)
        if len(calls) == 4 and what == "gradient":
            model.lm_head.weight.grad[0, 0] = math.nan
        return (loss * math.nan if len(calls) == 4 and what == "loss" else loss), rows
    calls, script = [], STAGES[stage][0]
    real = script.accumulate_gradients
    monkeypatch.setattr(script, "accumulate_gradients", diverge)
    if stage == "rl":  # a step in which no answer is better than another would be left out
        monkeypatch.setattr(script, "roll_out", with_a_better_answer(script.roll_out))
    with pytest.raises(UserError, match={"loss": "step 3 is nan.*step 2", "gradient": "gradient's norm is nan"}[what]):
        run_stage(stage, eval_every=-1, save_every=2)
    manager = CheckpointManager(get_checkpoint_dir(stage, "d1"))
    deadline = time.monotonic() + 30  # the checkpoint is written in the background; a process would wait at its end
    while not manager.steps() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert manager.steps() == [2] and len(calls) == 4
    assert all(p.isfinite().all() for p in manager.load_model(torch.device("cpu")).parameters())


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_a_resumed_run_keeps_the_number_format_it_began_with(stage, monkeypatch, capsys):
    """On a machine where another one is faster, with nothing asked for."""
    unbroken = curve(stage)
    monkeypatch.delenv("NANOCHAT_PRECISION")
    monkeypatch.setattr(precision, "_settled", {})
    monkeypatch.setattr(precision, "core_matmul_rate", lambda width, rows, dtype: 1e9 * (1 + (dtype != torch.float32)))
    run_stage(stage, resume_from_step=2)
    assert "precision: float32 (as the run began)" in capsys.readouterr().out
    assert curve(stage) == unbroken


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_keeps_the_tokenizer_it_began_with(stage, base_dir):
    """Meanwhile another tokenizer was trained, and the stage before was trained again with it."""
    manager = CheckpointManager(get_checkpoint_dir(stage, "d1"))
    unbroken, hash_before = curve(stage), manager.load_meta(2)[1]["tokenizer_hash"]
    other = RustBPETokenizer.train_from_iterator(iter(["quite another text, of other words"]), 270)
    other.save(base_dir / "tokenizer")
    for name in STAGES:
        source = CheckpointManager(get_checkpoint_dir(name, "d1"))
        if name != stage:
            source.save(5, source.load_model(torch.device("cpu")), tokenizer=other)
    run_stage(stage, resume_from_step=2)
    assert curve(stage) == unbroken
    assert manager.load_meta(4)[1]["tokenizer_hash"] == hash_before != other.hash()


def test_a_resumed_rl_run_compares_with_the_model_it_began_with():
    """Meanwhile the source stage has saved a later step; another step or stage is refused by name."""
    unbroken = curve("rl")
    device = torch.device("cpu")
    source = CheckpointManager(get_checkpoint_dir("sft", "d1"))
    began_with = source.last_step()
    later = source.load_model(device)
    with torch.no_grad():
        for parameter in later.parameters():
            parameter.mul_(0.5)
    source.save(began_with + 1, later, tokenizer=source.load_tokenizer(began_with))

    run_stage("rl", resume_from_step=2)
    assert curve("rl") == unbroken and "kl" in unbroken[-2]
    run_stage("rl", resume_from_step=2, model_step=began_with)
    with pytest.raises(UserError, match=f"--model_step={began_with + 1}.* began with {began_with}"):
        run_stage("rl", resume_from_step=2, model_step=began_with + 1)
    with pytest.raises(UserError, match="--source=mid"):
        run_stage("rl", resume_from_step=2, source="mid")


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_the_users_own_conversations_join_the_mixture(stage, tmp_path, capsys):
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(turns)}\n" * 3, encoding="utf-8")
    sizes = []
    for data in (None, str(tmp_path / "chats.jsonl")):
        run_stage(stage, data=data, num_iterations=1, eval_every=-1)
        sizes.append(int(re.search(r"mixture: (\d+) conversations", capsys.readouterr().out)[1]))
    assert sizes[1] == sizes[0] + 3


def test_an_rl_step_without_a_better_answer_changes_nothing(monkeypatch):
    """Neither weights nor optimizers, whose momentum is not 0 by then."""
    rewards = iter([0, 1] * 4 + [1] * 8)  # 2 steps of 2 questions with 2 answers each, then 2 more
    monkeypatch.setattr("tests.stages.odd_length", lambda *_: float(next(rewards)))
    run_stage("rl", save_every=1, keep_last=-1, eval_every=-1)
    folder = get_checkpoint_dir("rl", "d1")
    files = {}
    for step in (1, 2, 3, 4):
        paths = sorted((folder / f"step_{step:06d}").glob("*.safetensors"))
        files[step] = {path.name: load_file(path) for path in paths}

    def differ(a, b):
        names = [(name, key) for name in files[a] for key in files[a][name]]
        assert len(files[a]) >= 2 and len(names) > 10
        return any(not torch.equal(files[a][name][key], files[b][name][key]) for name, key in names)
    assert differ(1, 2) and not differ(2, 3) and not differ(3, 4)
    losses = [(line["train/loss"], line["useful"]) for line in curve("rl") if "train/loss" in line]
    assert losses[2:] == [(0, 0), (0, 0)] and all(useful > 0 for _, useful in losses[:2])


@pytest.mark.parametrize("then, now, said", [
    (4, 6, "had come to its end, step 4.*with 6 steps they rise again"), (4, 4, "step 4 is the end of the run"),
    (6, 5, "was to end at step 6, now at 5")])
def test_going_on_past_a_runs_end_is_said(then, now, said, capsys):
    run_stage("sft", num_iterations=then, save_every=4, keep_last=-1, eval_every=-1)
    assert not re.search(said, capsys.readouterr().out)
    run_stage("sft", num_iterations=now, resume_from_step=4, eval_every=-1)
    assert re.search(said, capsys.readouterr().out)


def test_a_warmup_longer_than_the_run_is_said(capsys):
    run_stage("base", warmup_iters=10, eval_every=-1)
    assert "the warmup takes 10 steps, the run 4: the learning rate never reaches" in capsys.readouterr().out
    run_stage("base", warmup_iters=3, eval_every=-1)
    assert "the warmup takes" not in capsys.readouterr().out


def test_a_question_asked_twice_in_a_step_is_answered_by_other_samples(monkeypatch):
    def roll_out(engine, task, places):
        rows.extend(real(engine, task, places)[0])
        return real(engine, task, places)
    rows, real = [], chat_rl.roll_out
    monkeypatch.setattr(chat_rl, "roll_out", roll_out)
    run_stage("rl", num_iterations=1, examples_per_step=2 * len(GSM8K(split="train")), num_samples=2, eval_every=-1,
              temperature=1.0, top_k=0)
    answers = {}
    for row in rows:
        answers.setdefault(tuple(row.prompt), []).append(tuple(row.tokens))
    assert all(len(sampled) == 4 for sampled in answers.values())
    assert sum(len(set(sampled)) == 4 for sampled in answers.values()) > len(answers) / 2
