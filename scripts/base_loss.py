"""
Bits per byte of a checkpoint on the training and the validation text, and samples.

    python -m scripts.base_loss
    torchrun --standalone --nproc_per_node=8 -m scripts.base_loss
    python -m scripts.base_loss --eval_tokens=4096 --model_tag=d4          (a CPU)
"""

from nanochat.checkpoint_manager import load_checkpoint
from nanochat.common import compute_cleanup, compute_init, print0, run_script
from nanochat.configurator import CountOrOff, NonNegative, Positive, get_settings, override_from_cli
from nanochat.dataloader import eval_batches, eval_rows
from nanochat.dataset import describe_skipped, get_spans
from nanochat.engine import Engine, complete_prompts
from nanochat.loss_eval import evaluate_bpb
from nanochat.report import get_report
from nanochat.tokenizer import get_token_bytes

# -----------------------------------------------------------------------------
# Settings
source: str = "base"               # stage of the checkpoint: base, mid, sft or rl
model_tag: str | None = None       # model to load; None = the one saved last
model_step: int | None = None      # step to load; None = the last
device_type: str = ""              # cuda, mps or cpu; empty = detect
data: str | None = None            # file, folder or glob; None = the default corpus
text_field: str = "text"           # column or field of the text, in .parquet and .jsonl
strict: bool = False               # refuse rows without text; False = skip and count them
eval_tokens: CountOrOff = 10485760  # tokens of each split to score; -1 = all
device_batch_size: Positive = 8    # rows at a time
temperature: NonNegative = 0.8     # of the unconditioned samples
seed: int = 42                     # of the unconditioned samples

NUM_UNCONDITIONED = 4
SAMPLE_TOKENS = 64


def sample_all(model, tokenizer):
    """
    [{prompt, text}]: greedy completions of the prompts, then samples from nothing but <|bos|>.
    """
    engine = Engine(model, tokenizer)
    samples = complete_prompts(engine)
    bos = tokenizer.get_bos_token_id()
    sequences, _ = engine.generate_batch(
        [bos], NUM_UNCONDITIONED, max_tokens=SAMPLE_TOKENS, temperature=temperature, seed=seed)
    for sequence in sequences:
        samples.append({"prompt": "", "text": tokenizer.decode(sequence[1:])})
    return samples


def main():
    # Device, ranks, model
    settings = get_settings(globals())
    ddp_rank, _, ddp_world_size, device = compute_init(device_type)
    model, tokenizer, meta = load_checkpoint(source, device, model_tag, model_step)
    token_bytes = get_token_bytes(device, tokenizer)
    print0(f"model: {source}, step {meta['step']}, {model.num_params():,} parameters")

    # Bits per byte of both splits; ranks share the rows
    bpb = {}
    for split in ("train", "val"):
        spans = get_spans(data, split, text_field, strict)
        rows = eval_rows(tokenizer, spans, model.config.sequence_len, eval_tokens)
        my_rows = rows[ddp_rank::ddp_world_size]
        batches = eval_batches(my_rows, device_batch_size, device)
        bpb[split] = evaluate_bpb(model, batches, token_bytes)
        print0(f"{split} bpb: {bpb[split]:.6f} | rows: {len(rows)} | "
               f"rows without text: {describe_skipped(spans)}")

    # Samples, on rank 0
    samples = []
    if ddp_rank == 0:
        samples = sample_all(model, tokenizer)
    for sample in samples:
        print0(f"sample: {sample['text']!r}")

    # Report and cleanup
    section = "Base model loss" if source == "base" else f"Loss of the {source} model"
    get_report().log(section, {
        "config": settings,
        "samples": samples,
        "train bpb": bpb["train"],
        "metrics": {"bpb": bpb["val"]},
    })
    compute_cleanup()


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
