"""
Bits per byte of a checkpoint on the training and the validation text, and samples.

    python -m scripts.base_loss
    torchrun --standalone --nproc_per_node=8 -m scripts.base_loss
    python -m scripts.base_loss --eval_tokens=4096 --model_tag=d4          (a CPU)
    python -m scripts.base_loss --per_document --data=texts.jsonl

Usually documents are packed into rows, as in training without --crop. The last row is padded, and every token is
scored. With --per_document every document is scored alone and whole: the figure that lm-evaluation-harness calls
bits_per_byte. It cuts a document that is longer than the model's context into windows. With --cut=pieces it is cut as
in training: each piece starts with <|bos|>, which is what the model knows.

The standard error is that over documents, in both cases.
"""

from typing import Literal

from nanochat.checkpoint_manager import load_checkpoint
from nanochat.common import compute_cleanup, compute_init, print0, run_script
from nanochat.configurator import CountOrOff, NonNegative, Positive, get_settings, override_from_cli
from nanochat.dataloader import eval_batches, eval_rows, token_documents
from nanochat.dataset import describe_skipped, get_both_spans, get_spans
from nanochat.engine import Engine, complete_prompts
from nanochat.loss_eval import document_pieces, document_windows, evaluate_bpb, window_batches
from nanochat.progress import show_progress
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
split: Literal["both", "train", "val"] = "both"  # text to score
per_document: bool = False         # score each document alone and whole, instead of packed rows
cut: Literal["windows", "pieces"] = "windows"  # how --per_document cuts a document longer than the context
device_batch_size: Positive = 8    # rows at a time
temperature: NonNegative = 0.8     # of the unconditioned samples
seed: int = 42                     # of the unconditioned samples
sample: bool = True                # complete prompts, too
verify: bool = True                # compare the checkpoint with its checksums

NUM_UNCONDITIONED = 4
SAMPLE_TOKENS = 64


def whole_documents(tokenizer, spans, sequence_len):
    """[(number, windows)] of the first documents of `spans`, until these have eval_tokens tokens."""
    cut_document = document_pieces if cut == "pieces" else document_windows
    bos = tokenizer.get_bos_token_id()
    documents = []
    num_tokens = 0
    texts = token_documents(tokenizer, spans, seed=0, epochs=1)
    for _, ids in show_progress(texts, "cutting", "documents"):
        documents.append((len(documents), cut_document(ids, bos, sequence_len)))
        num_tokens += len(ids)
        if 0 < eval_tokens <= num_tokens:
            break
    return documents


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
    model, tokenizer, meta = load_checkpoint(source, device, model_tag, model_step, verify)
    token_bytes = get_token_bytes(device, tokenizer)
    print0(f"model: {source}, step {meta['step']}, {model.num_params():,} parameters")

    # Bits per byte of the splits; ranks share rows or documents
    bpb = {}
    if split == "both":
        train_spans, val_spans = get_both_spans(data, text_field, strict)
        splits = {"train": train_spans, "val": val_spans}
    else:
        splits = {split: get_spans(data, split, text_field, strict)}
    for name, spans in splits.items():
        if per_document:
            documents = whole_documents(tokenizer, spans, model.config.sequence_len)
            batches = window_batches(documents[ddp_rank::ddp_world_size], device_batch_size, device)
        else:
            rows = eval_rows(tokenizer, spans, model.config.sequence_len, eval_tokens)
            batches = eval_batches(rows[ddp_rank::ddp_world_size], device_batch_size, device)
        bpb[name] = evaluate_bpb(model, batches, token_bytes)
        print0(f"{name} bpb: {bpb[name]} | documents: {bpb[name].n} | rows without text: {describe_skipped(spans)}")

    # Samples, on rank 0
    samples = []
    if sample and ddp_rank == 0:
        samples = sample_all(model, tokenizer)
    for completion in samples:
        print0(f"sample: {completion['text']!r}")

    # Report and cleanup
    section = "Base model loss" if source == "base" else f"Loss of the {source} model"
    metric = "bpb"
    if per_document:  # another figure, which does not replace the usual one
        section += " per document"
        metric = "bpb per document"
    facts = {"config": settings, "samples": samples}
    if "train" in bpb:
        facts[f"train {metric}"] = str(bpb["train"])
    if "val" in bpb:
        facts["metrics"] = {metric: bpb["val"]._asdict()}
    get_report().log(section, facts)
    compute_cleanup()


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
