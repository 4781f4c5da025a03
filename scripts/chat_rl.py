"""
Reinforcement learning on word problems: GRPO reduced to its core.

    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl
    python -m scripts.chat_rl --num_iterations=4 --examples_per_step=2 --num_samples=4 --eval_examples=8   (a CPU)

Several answers are sampled to each question and rewarded 1 when right, 0 when wrong; an answer's advantage is its
reward minus the mean of its question's (arXiv 2402.03300, without dividing by the standard deviation, arXiv
2503.20783). Every step trains once on what the present model wrote, so there is no ratio to clip, and no KL term: the
loss is the negative log-likelihood weighted by the advantage, summed over the tokens that the model sampled (including
the stop token, excluding what a tool forced) and divided by their number over all ranks. KL to the model at the start,
the reference model, and entropy are logged.
"""

import copy
import time
from itertools import islice

import numpy as np
import torch

from nanochat.checkpoint_manager import stage_managers
from nanochat.common import (
    IGNORE,
    UserError,
    ceil_div,
    compiles,
    compute_cleanup,
    compute_init,
    get_dist_info,
    peak_memory_bytes,
    print0,
    run_script,
    synchronize,
)
from nanochat.configurator import get_settings, override_from_cli
from nanochat.dataloader import to_device
from nanochat.distributed import all_reduce_sum
from nanochat.engine import Engine, Sampling
from nanochat.inference import compile_decoding, prepare, refresh
from nanochat.precision import describe_precision, get_autocast_ctx, get_precision_dtype
from nanochat.report import get_report
from nanochat.training import (
    RunKeeper,
    accumulate_gradients,
    attempt,
    check_finite,
    check_settings,
    choose_device_batch_size,
    fit_rows,
    lr_multiplier,
    make_scaler,
    optimizer_step,
    resume_step,
    set_rates,
)
from tasks.evaluate import cut_prompt, evaluate_generative
from tasks.gsm8k import GSM8K

# -----------------------------------------------------------------------------
# Settings
run: str = "dummy"                   # wandb run name; dummy = log to metrics.jsonl only
device_type: str = ""                # cuda, mps or cpu; empty = detect
seed: int = 42                       # of the order of questions and of the samples
# Model
source: str = "sft"                  # stage to start from: sft or mid
model_tag: str | None = None         # its tag, and the result's; None = the one saved last
model_step: int | None = None        # its step; None = the last
# Horizon
num_epochs: int = 1                  # passes over the questions
num_iterations: int = -1             # optimizer steps; -1 = num_epochs
# Rollouts
examples_per_step: int = 16          # questions per optimizer step over all ranks
num_samples: int = 16                # answers per question
max_new_tokens: int = 256            # per answer
temperature: float = 1.0             # of the samples; 1 = what the loss assumes
top_k: int = 0                       # of the samples; 0 = off, what the loss assumes
rollout_rows: int = 64               # answers generated at a time on each rank
# Optimization
device_batch_size: int = -1          # rows per micro-batch, more if they are short; -1 = what the memory holds
embedding_lr: float = 0.2            # Adam, token embedding; scaled by 1 / sqrt(width / 768)
unembedding_lr: float = 0.004        # Adam, output head; scaled likewise
matrix_lr: float = 0.02              # Muon, all matrices of the blocks
init_lr_frac: float = 0.05           # all learning rates start at this fraction and fall linearly to 0
# Evaluation and checkpoints
eval_every: int = 60                 # steps between evaluations on held-out questions; -1 = at the end only
eval_examples: int = 400             # held-out questions to ask; -1 = all
eval_samples: int = 1                # answers to each, for pass@k; 1 = greedy
save_every: int = 60                 # steps between checkpoints (one is also saved before every evaluation)
keep_last: int = 2                   # newest checkpoints to keep; -1 = all
resume_from_step: int = -1           # step to go on from; -2 = the latest checkpoint, -1 = start anew

KL_ROWS = 16  # answers a step, about, on which KL and entropy are estimated, on rank 0


# -----------------------------------------------------------------------------


def step_questions(task, step):
    """
    This rank's share of the questions of a step, dealt out to the ranks: (place, index) each, the place in one shuffled
    pass after another.
    """
    ddp_rank, _, ddp_world_size = get_dist_info()
    end = (step + 1) * examples_per_step
    if num_iterations <= 0:
        end = min(end, num_epochs * len(task))  # the last step of the last pass may be short
    for place in range(step * examples_per_step, end)[ddp_rank::ddp_world_size]:
        epoch, place_in_epoch = divmod(place, len(task))
        yield place, int(np.random.default_rng([seed, epoch]).permutation(len(task))[place_in_epoch])


def make_rollout_model(model):
    """The model that samples the answers: a copy in the compute dtype, so that decoding never casts, or itself."""
    if get_precision_dtype(model.device.type) == torch.float32:
        return model
    return prepare(copy.deepcopy(model))


@torch.no_grad()
def sync_rollout_model(rollout_model, model):
    """Give it the parameters that the last step left."""
    if rollout_model is not model:
        refresh(rollout_model, model)


def roll_out(engine, task, step):
    """
    Sample the answers of this rank's questions. Returns (rows, rewards, advantages), each with num_samples entries per
    question; what is sampled depends on the seed, the question's place in the run and the sample alone.
    """
    context = engine.model.config.sequence_len
    room = min(max_new_tokens, context // 2)
    rows, conversations = [], []
    for place, index in step_questions(task, step):
        conversation = task[index]
        prompt = cut_prompt(engine.tokenizer.render_for_completion(conversation), context - room)
        for sample in range(num_samples):
            sampling = Sampling(temperature, top_k, seed=f"{seed}:{place}:{sample}")
            rows.append(engine.make_row(prompt, sampling, room))
            conversations.append(conversation)
    for _ in engine.generate_rows(rows, rollout_rows):
        pass
    rewards = np.array([task.reward(conversation, engine.tokenizer.decode(row.tokens))
                        for row, conversation in zip(rows, conversations, strict=True)], dtype=np.float32)
    by_question = rewards.reshape(-1, num_samples)
    return rows, rewards, (by_question - by_question.mean(axis=1, keepdims=True)).reshape(-1)


def training_arrays(rows, advantages, max_len):
    """
    (inputs, targets, weights), (R, T) each, T at most max_len, of finished rows: the targets are the tokens that the
    model sampled, the weight of each is its answer's advantage.
    """
    longest = max((len(row.prompt) + len(row.tokens) for row in rows), default=1) - 1
    T = min(max_len, 32 * ceil_div(longest, 32))  # few shapes occur
    inputs = np.zeros((len(rows), T), dtype=np.int32)
    targets = np.full((len(rows), T), IGNORE, dtype=np.int32)
    weights = np.zeros((len(rows), T), dtype=np.float32)
    for i, (row, advantage) in enumerate(zip(rows, advantages, strict=True)):
        ids = np.array(row.prompt + row.tokens)
        start = len(row.prompt) - 1  # the position that predicts the first sampled token
        inputs[i, : len(ids) - 1] = ids[:-1]
        targets[i, start: len(ids) - 1] = np.where(np.array(row.mask) == 1, row.tokens, IGNORE)
        weights[i] = advantage
    return inputs, targets, weights


@torch.no_grad()
def compare_models(model, ref_model, inputs, targets, device_rows):
    """
    (KL to the reference model, entropy) in nats per token, estimated on sampled tokens: the means of log p - log p_ref
    and of -log p (Schulman 2020, "Approximating KL divergence", k1).
    """
    sums = torch.zeros(3)
    for rows, T in fit_rows(targets, device_rows):
        x, y = (to_device(array[rows, :T], model.device) for array in (inputs, targets))
        with get_autocast_ctx(model.device):
            nll, nll_ref = (m(x, y, loss_reduction="none") for m in (model, ref_model))
        sums += torch.stack([(nll_ref - nll).sum(), nll.sum(), (y != IGNORE).sum()]).cpu()
    return (sums[0] / sums[2].clamp(min=1)).item(), (sums[1] / sums[2].clamp(min=1)).item()


def main():
    # Init: device, ranks, the model to start from, or this stage's own checkpoint to resume
    settings = get_settings(globals())
    check_settings(settings)
    if temperature <= 0:  # all answers to a question would be the same: nothing to learn from
        raise UserError(f"--temperature={temperature}: need more than 0", "leave --temperature out for its default")
    _, _, ddp_world_size, device = compute_init(device_type, seed)
    print0(f"device: {device} x {ddp_world_size} | precision: {describe_precision(device.type)}")
    if source not in ("sft", "mid"):
        raise UserError(f"--source={source}: need sft or mid", "--source=sft")
    manager, source_manager = stage_managers("rl", source, model_tag, resume_from_step)
    source_step, _ = source_manager.load_meta(model_step)  # of a resumed run, too: the model to compare with
    step, state = resume_step(manager, resume_from_step, settings, ("seed", "examples_per_step"))
    ref_model = source_manager.load_model(device, source_step).requires_grad_(False)
    prepare(ref_model)  # only compared with
    begin, begin_step = (source_manager, source_step) if state is None else (manager, step)
    tokenizer, model = begin.load_tokenizer(begin_step), begin.load_model(device, begin_step)
    rollout_model = make_rollout_model(model)
    if rollout_model is not model and compiles(device):
        compile_decoding(rollout_model)
    engine = Engine(rollout_model, tokenizer)

    # Data and horizon
    train_task, test_task = GSM8K(split="train"), GSM8K(split="test")
    iterations = num_iterations if num_iterations > 0 else ceil_div(len(train_task) * num_epochs, examples_per_step)
    most_rows = ceil_div(examples_per_step, ddp_world_size) * num_samples
    device_rows = choose_device_batch_size(device_batch_size, model.config, device, most_rows)
    print0(f"model: {source_manager.checkpoint_dir.name}, {source} step {source_step} | questions: {len(train_task):,} "
           f"| {examples_per_step} x {num_samples} answers per step, {device_rows} at a time on each of "
           f"{ddp_world_size} ranks | steps: {iterations:,}")

    # Optimizers
    optimizers = model.setup_optimizers(embedding_lr, unembedding_lr, matrix_lr)
    scaler = make_scaler(device, state)
    if state is not None:
        manager.load_optimizers(optimizers, step)

    # State of the loop
    progress = (state or {}).get("progress", {"train_s": 0.0, "start": None, "accuracy": None, "rollouts": 0})
    data = f"{len(train_task):,} questions, compared with {source} step {source_step}"
    keeper = RunKeeper(manager, settings, iterations, step, state, data, device)
    samples = []

    def evaluate():
        sampled = dict(num_samples=eval_samples, temperature=1.0, top_k=50) if eval_samples > 1 else {}
        return evaluate_generative(test_task, engine, tokenizer, max_new_tokens=max_new_tokens, batch_rows=rollout_rows,
                                   max_problems=eval_examples, **sampled)[0]

    # Loop: save, evaluate, roll out, train
    while True:
        last = step == iterations
        eval_due = last or (eval_every > 0 and step % eval_every == 0)
        # Save first: whatever fails later, the steps so far are on disk
        if keeper.save_due(step, eval_due):
            keeper.save(step, model, optimizers, tokenizer, scaler, progress=progress)
        if keeper.stopping:
            break

        # Evaluate: held-out questions, pass@k
        if eval_due:
            result = attempt("the evaluation", evaluate)
            if result is not None:
                progress["accuracy"] = {"value": result["accuracy"], "n": result["n"], "stderr": result["stderr"]}
                progress["start"] = progress["start"] or progress["accuracy"]
                passes = {f"pass@{k}": value for k, value in result["pass_at_k"].items()}
                print0(f"step: {step:05d} | " + " | ".join(f"{name}: {value:.4f}" for name, value in passes.items()) +
                       f" | n: {result['n']} | stderr: {result['stderr']:.4f}")
                keeper.log({"step": step, **passes})
        if last:
            break

        # Roll out: answers of the present model to this step's questions
        synchronize(device)
        start = time.perf_counter()
        rows, rewards, advantages = roll_out(engine, train_task, step)
        rollout_s = time.perf_counter() - start
        samples = [{"prompt": tokenizer.decode(row.prompt[1:]), "text": f"{tokenizer.decode(row.tokens)} -> {reward:g}"}
                   for row, reward in islice(zip(rows, rewards, strict=True), 4)]

        # Train: one optimizer step; ranks may have sampled different numbers of tokens
        lr_factor = init_lr_frac * lr_multiplier(step, iterations, 0, 1.0)
        set_rates(optimizers, lr_factor)
        inputs, targets, weights = training_arrays(rows, advantages, model.config.sequence_len)
        local = [(targets != IGNORE).sum(), rewards.sum(), len(rows), (advantages != 0).sum()]
        num_targets, reward_sum, num_rollouts, num_useful = all_reduce_sum(
            torch.tensor(local, dtype=torch.float32, device=device)).tolist()
        some = slice(None, None, max(1, len(rows) // KL_ROWS))  # answers to several questions
        kl, entropy = compare_models(model, ref_model, inputs[some], targets[some], device_rows)
        loss, device_rows = accumulate_gradients(model, inputs, targets, int(num_targets), device_rows, weights, scaler)
        loss = check_finite(loss, step, f"question {step * examples_per_step} and after", manager)
        grad_norm = optimizer_step(model, optimizers, scaler)
        sync_rollout_model(rollout_model, model)
        synchronize(device)
        dt_s = time.perf_counter() - start

        # Log
        step += 1
        progress["train_s"] += dt_s
        progress["rollouts"] += int(num_rollouts)
        reward, length = reward_sum / num_rollouts, num_targets / num_rollouts
        keeper.log({"step": step, "reward": reward, "kl": kl, "entropy": entropy, "train/loss": loss,
                    "lrm": lr_factor, "grad_norm": grad_norm, "answer_tokens": length, "dt_ms": 1000 * dt_s,
                    "useful": num_useful / num_rollouts, "rollouts_per_sec": num_rollouts / rollout_s,
                    "memory_bytes": peak_memory_bytes(device)})
        print0(f"step: {step:05d}/{iterations:05d} ({100 * step / iterations:.1f}%) | reward: {reward:.4f} | "
               f"kl: {kl:.4f} | entropy: {entropy:.4f} | tokens: {length:.1f} | lrm: {lr_factor:.3f} | "
               f"dt: {1000 * dt_s:.0f}ms | rollouts/s: {num_rollouts / rollout_s:.1f} | "
               f"eta: {progress['train_s'] / step * (iterations - step) / 60:.1f}m")

    # Summary and cleanup
    print0(f"peak memory: {peak_memory_bytes(device) / 2**20:,.0f} MiB | train time: {progress['train_s'] / 60:.2f}m")
    get_report().log("Chat RL", {
        "config": settings, "curves": str(manager.checkpoint_dir / "metrics.jsonl"), "samples": samples, "steps": step,
        "metrics": {"GSM8K while training": progress["accuracy"]}, "GSM8K before": progress["start"],
        "answers sampled": progress["rollouts"], "training minutes": progress["train_s"] / 60})
    compute_cleanup()
    keeper.close()


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
