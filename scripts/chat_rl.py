"""
Reinforcement learning on word problems: GRPO reduced to its core.

    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl
    python -m scripts.chat_rl --num_iterations=4 --examples_per_step=2 --num_samples=4 \
        --eval_examples=8                                                          (a CPU)

Several answers are sampled to each question and rewarded 1 when right, 0 when wrong; an answer's
advantage is its reward minus the mean of its question's (arXiv 2402.03300, without dividing by the
standard deviation, arXiv 2503.20783). Every step trains once on what the present model wrote, so
there is no ratio to clip, and no KL term: the loss is the negative log-likelihood weighted by the
advantage, summed over the tokens that the model sampled (including the stop token, excluding what a
tool forced) and divided by their number over all ranks. A step whose advantages are all 0 changes
nothing. KL to the model at the start, the reference model, and entropy are logged.
"""

import copy
import time
from typing import Annotated, Literal

import numpy as np
import torch

from nanochat.checkpoint_manager import stage_managers
from nanochat.common import IGNORE, UserError, ceil_div, compiles, print0, run_script
from nanochat.configurator import (
    Count,
    CountOrOff,
    NonNegative,
    Positive,
    Range,
    get_settings,
    override_from_cli,
)
from nanochat.dataloader import to_device
from nanochat.distributed import all_reduce_sum
from nanochat.engine import Engine, Sampling
from nanochat.horizon import (
    choose_device_batch_size,
    count_examples,
    shuffled_indices,
    step_places,
)
from nanochat.inference import compile_decoding, prepare, refresh
from nanochat.precision import get_autocast_ctx, get_precision_dtype
from nanochat.run_keeper import RunKeeper, attempt, is_due
from nanochat.stage import open_stage
from nanochat.trackers import Tracker
from nanochat.training import (
    accumulate_gradients,
    lr_multiplier,
    micro_batches,
    optimizer_step,
    set_rates,
)
from tasks.evaluate import cut_prompt, evaluate_generative
from tasks.gsm8k import GSM8K

# -----------------------------------------------------------------------------
# Settings
run: str = "dummy"                    # name of the run; dummy = log to metrics.jsonl only
tracker: Tracker = "wandb"            # where a run with a name is also logged: trackers.py
device_type: str = ""                 # cuda, mps or cpu; empty = detect
seed: int = 42                        # of the order of questions and of the samples
# Model
source: Literal["sft", "mid"] = "sft"  # stage to start from
model_tag: str | None = None          # its tag, and the result's; None = the one saved last
model_step: int | None = None         # its step; None = the last; a resumed run keeps its own
# Horizon
num_epochs: Positive = 1              # passes over the questions
num_iterations: CountOrOff = -1       # optimizer steps; -1 = num_epochs
# Rollouts
examples_per_step: Positive = 16      # questions per optimizer step over all ranks
num_samples: Annotated[int, Range(2)] = 16  # answers per question, compared with each other
max_new_tokens: Positive = 256        # per answer
temperature: Annotated[float, Range(0.01)] = 1.0  # of the samples; the loss assumes 1
top_k: Count = 0                      # of the samples; 0 = off, as the loss assumes
rollout_rows: Positive = 64           # answers generated at a time on each rank
# Optimization
device_batch_size: CountOrOff = -1    # rows per micro-batch; -1 = as many as should fit
embedding_lr: NonNegative = 0.2       # Adam, token embedding; scaled by 1 / sqrt(width / 768)
unembedding_lr: NonNegative = 0.004   # Adam, output head; scaled likewise
value_lr: NonNegative = 0.1           # Adam, value embeddings; scaled likewise
matrix_lr: NonNegative = 0.02         # Muon, all matrices of the blocks
init_lr_frac: NonNegative = 0.05      # all learning rates start at this fraction, fall to 0
# Evaluation and checkpoints
eval_every: CountOrOff = 60           # steps between evaluations; -1 = at the end only
eval_examples: CountOrOff = 400       # held-out questions to ask; -1 = all
eval_samples: Positive = 1            # answers to each, for pass@k; 1 = greedy
save_every: CountOrOff = 60           # steps between checkpoints, besides those at evaluations
keep_last: CountOrOff = 2             # newest checkpoints to keep; -1 = all
resume_from_step: int = -1            # step to go on from; -2 = the latest, -1 = new run
auto_resume: bool = False             # go on from the latest checkpoint, if there is one
verify: bool = True                   # compare checkpoints with their checksums when they are read

# Settings that a resumed run cannot change; model_step: see load_reference
FIXED = ("seed", "source", "examples_per_step")

KL_ROWS = 16       # answers a step, about, on which each rank estimates KL and entropy
SHOWN_ANSWERS = 4  # answers of the last step in the report

# -----------------------------------------------------------------------------
# Rollouts


def load_reference(source_manager, stage):
    """
    The model that the run began with. A resumed run takes the step that it began with, although
    the source stage may have saved later ones since.
    """
    reference_step = stage.progress["reference_step"]
    if model_step not in (None, reference_step):
        raise UserError(
            f"--model_step={model_step}, but the run that is resumed began with {reference_step}",
            f"resume with --model_step={reference_step}, or leave --resume_from_step out for a new "
            "run")
    return prepare(source_manager.load_model(stage.device, reference_step))


def make_rollout_model(model):
    """
    The model that samples the answers: a copy in the compute dtype, so that decoding never casts.
    In float32 it is the model itself.
    """
    if get_precision_dtype(model.device.type) == torch.float32:
        return model
    rollout_model = prepare(copy.deepcopy(model))
    if compiles(model.device):
        compile_decoding(rollout_model)
    return rollout_model


def roll_out(engine, task, places):
    """
    Sample the answers to the questions at these places of the run. Returns (rows, rewards,
    advantages), each with num_samples entries per question. The samples depend on the seed, the
    question's place and the sample's number alone.
    """
    context = engine.model.config.sequence_len
    max_tokens = min(max_new_tokens, context // 2)

    # One row per answer: num_samples rows next to each other share a prompt, which is read once
    rows = []
    conversations = []
    indices = shuffled_indices(places, len(task), seed)
    for place, index in zip(places, indices, strict=True):
        conversation = task[index]
        prompt = engine.tokenizer.render_for_completion(conversation)
        prompt = cut_prompt(prompt, context - max_tokens)
        for sample in range(num_samples):
            sampling = Sampling(temperature, top_k, seed=f"{seed}:{place}:{sample}")
            rows.append(engine.make_row(prompt, sampling, max_tokens))
            conversations.append(conversation)
    for _ in engine.generate_rows(rows, rollout_rows):
        pass  # the rows themselves keep their tokens

    # Reward each answer; compare it with the others to its question
    rewards = np.zeros(len(rows), dtype=np.float32)
    for i, row in enumerate(rows):
        rewards[i] = task.reward(conversations[i], engine.tokenizer.decode(row.tokens))
    # float64: a mean of equal rewards is exactly these, so the advantages are exactly 0
    by_question = rewards.reshape(-1, num_samples)
    advantages = by_question - by_question.mean(axis=1, keepdims=True, dtype=np.float64)
    return rows, rewards, advantages.reshape(-1)


def training_arrays(rows, advantages, max_len):
    """
    (inputs, targets, weights), (R, T) each, T at most max_len, of finished rows: the targets are
    the tokens that the model sampled, the weight of each is its answer's advantage.
    """
    longest = max((len(row.prompt) + len(row.tokens) for row in rows), default=1) - 1
    T = min(max_len, 32 * ceil_div(longest, 32))  # few shapes occur
    inputs = np.zeros((len(rows), T), dtype=np.int32)
    targets = np.full((len(rows), T), IGNORE, dtype=np.int32)
    weights = np.zeros((len(rows), T), dtype=np.float32)
    for i, row in enumerate(rows):
        # A tool's result was not sampled by the model: no target
        ids = row.prompt + row.tokens
        end = len(ids) - 1
        start = len(row.prompt) - 1  # the position that predicts the first sampled token
        inputs[i, :end] = ids[:-1]
        targets[i, start:end] = np.where(np.array(row.mask) == 1, row.tokens, IGNORE)
        weights[i] = advantages[i]
    return inputs, targets, weights


@torch.no_grad()
def compare_models(model, ref_model, inputs, targets, device_rows):
    """
    (KL to the reference model, entropy) in nats per token, estimated on sampled tokens: the means
    of log p - log p_ref and of -log p (Schulman 2020, "Approximating KL divergence", k1).
    """
    kl = 0.0
    entropy = 0.0
    for rows, T in micro_batches(targets, device_rows):
        x = to_device(inputs[rows, :T], model.device)
        y = to_device(targets[rows, :T], model.device)
        with get_autocast_ctx(model.device):
            nll = model(x, y, loss_reduction="none")
            nll_ref = ref_model(x, y, loss_reduction="none")
        kl += (nll_ref - nll).sum().item()
        entropy += nll.sum().item()
    num_targets = max(1, int((targets != IGNORE).sum()))
    return kl / num_targets, entropy / num_targets


# -----------------------------------------------------------------------------


def main():  # noqa: PLR0915
    # Device, ranks, the model to start from, or this stage's own checkpoint to resume
    settings = get_settings(globals())
    manager, source_manager = stage_managers(
        "rl", source, model_tag, resume_from_step, auto_resume)
    source_step, _ = source_manager.load_meta(model_step)
    progress = {"start": None, "accuracy": None, "rollouts": 0, "reference_step": source_step}
    stage = open_stage(settings, manager, source_manager, FIXED, progress, mfu=False)
    device = stage.device
    model = stage.model
    tokenizer = stage.tokenizer
    progress = stage.progress

    # Two more models: the reference, which is only compared with, and the one that samples
    ref_model = load_reference(source_manager, stage)
    rollout_model = make_rollout_model(model)
    engine = Engine(rollout_model, tokenizer)

    # Data and horizon
    train_task = GSM8K(split="train")
    test_task = GSM8K(split="test")
    iterations, run_examples = count_examples(
        num_iterations, num_epochs, examples_per_step, len(train_task))
    most_rows = ceil_div(examples_per_step, stage.world_size) * num_samples
    device_rows = choose_device_batch_size(device_batch_size, model.config, device, most_rows)
    print0(f"questions: {len(train_task):,} | "
           f"{examples_per_step} x {num_samples} answers per step, "
           f"{device_rows} at a time on each of {stage.world_size} ranks | steps: {iterations:,}")

    # Optimizers
    optimizers = model.setup_optimizers(embedding_lr, unembedding_lr, matrix_lr, value_lr=value_lr)
    scaler = stage.load_optimizers(optimizers)

    def evaluate():
        result, _ = evaluate_generative(
            test_task,
            engine,
            tokenizer,
            num_samples=eval_samples,
            max_new_tokens=max_new_tokens,
            temperature=1.0 if eval_samples > 1 else 0.0,
            batch_rows=rollout_rows,
            max_problems=eval_examples,
        )
        return result

    # Loop: save, evaluate, roll out, train
    reference_step = progress["reference_step"]
    data = f"{len(train_task):,} questions, compared with {source} step {reference_step}"
    keeper = RunKeeper(stage, iterations, data)
    step = stage.step
    samples = []
    while True:
        last = step == iterations
        eval_due = last or is_due(step, eval_every)

        # Save first: whatever fails later, the steps so far are on disk
        keeper.save_if_due(step, eval_due)
        if keeper.stopping:
            break

        # Evaluate: held-out questions, pass@k
        if eval_due:
            result = attempt("the evaluation", evaluate)
            if result is not None:
                progress["accuracy"] = {
                    "value": result["accuracy"],
                    "n": result["n"],
                    "stderr": result["stderr"],
                }
                progress["start"] = progress["start"] or progress["accuracy"]
                passes = {f"pass@{k}": value for k, value in result["pass_at_k"].items()}
                keeper.log_evaluation(step, {**passes, "stderr": result["stderr"]})
        if last:
            break

        # Roll out: answers of the present model to this rank's share of the step's questions
        start = keeper.start_step()
        places = step_places(step, examples_per_step, run_examples)
        my_places = places[stage.rank::stage.world_size]
        rows, rewards, advantages = roll_out(engine, train_task, my_places)
        rollout_s = time.perf_counter() - start
        samples = []
        for row, reward in zip(rows[:SHOWN_ANSWERS], rewards, strict=False):
            text = f"{tokenizer.decode(row.tokens)} -> {reward:g}"
            samples.append({"prompt": tokenizer.decode(row.prompt[1:]), "text": text})
        if eval_due:
            keeper.log_samples(step, samples)

        # Compare with the reference model on answers to several questions
        inputs, targets, weights = training_arrays(rows, advantages, model.config.sequence_len)
        some = slice(None, None, max(1, len(rows) // KL_ROWS))
        kl, entropy = compare_models(model, ref_model, inputs[some], targets[some], device_rows)

        # Train: one optimizer step; ranks may have sampled different numbers of tokens
        lr_factor = init_lr_frac * lr_multiplier(step, iterations, warmup_iters=0, warmdown_ratio=1.0)
        set_rates(optimizers, lr_factor)
        counts = [(targets != IGNORE).sum(), rewards.sum(), len(rows), (advantages != 0).sum()]
        counts = all_reduce_sum(torch.tensor(counts, dtype=torch.float32, device=device))
        num_targets, reward_sum, num_rollouts, num_useful = counts.tolist()
        loss = 0.0
        grad_norm = 0.0
        # Without an answer that is better than another there is nothing to learn. An optimizer step
        # would move the weights all the same, by momentum and weight decay
        if num_useful > 0:
            loss, device_rows = accumulate_gradients(
                model, inputs, targets, int(num_targets), device_rows, weights, scaler)
            loss = keeper.check_finite(loss, step, f"question {step * examples_per_step} and after")
            grad_norm = optimizer_step(model, optimizers, scaler)
            if rollout_model is not model:
                refresh(rollout_model, model)

        # Log
        step += 1
        progress["rollouts"] += int(num_rollouts)
        keeper.finish_step(
            step, loss, int(num_targets), lr_factor, grad_norm,
            epoch=step * examples_per_step // len(train_task),
            num_targets=int(num_targets),
            reward=reward_sum / num_rollouts,
            kl=kl,
            entropy=entropy,
            answer_tokens=num_targets / num_rollouts,
            useful=num_useful / num_rollouts,
            rollouts_per_sec=num_rollouts / rollout_s,
        )

    # Report and cleanup
    keeper.finish("Chat RL", {
        "samples": samples,
        "steps": step,
        "metrics": {"GSM8K while training": progress["accuracy"]},
        "GSM8K before": progress["start"],
        "answers sampled": progress["rollouts"],
    })


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
