"""
A tour of the code: one paragraph becomes a tokenizer, rows of tokens, a trained model and new text.

    python -m dev.tour               some seconds on a CPU
    python -m pdb -m dev.tour        step by step: `b train_tokenizer` stops there, `s` goes into a call

Each part calls the functions that the training scripts call, and prints a few lines. The files to read next stand in
its docstring. Nothing is written to disk.
"""

import math

import numpy as np
import torch

from nanochat.common import compute_init, run_script
from nanochat.dataloader import shift
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.packing import pack_rows
from nanochat.tokenizer import RustBPETokenizer
from nanochat.training import accumulate_gradients, lr_multiplier, optimizer_step, set_rates

PARAGRAPH = (
    "The fox lived by the river. Every morning the fox walked to the river and looked at the water. "
    "One morning the water was gone. The fox asked the owl, and the owl asked the bear. "
    "The bear had built a wall, and behind the wall there was a lake. "
    "So the fox moved to the lake, and every morning the fox looked at the water of the lake."
)
VOCAB_SIZE = 256 + 40 + 9  # single bytes, tokens that are learned, special tokens
T = 24                     # tokens in a row
STEPS = 60


def train_tokenizer():
    """Byte pair encoding: the most frequent pair of neighbours becomes a token, again and again. tokenizer.py"""
    tokenizer = RustBPETokenizer.train_from_iterator(iter([PARAGRAPH]), VOCAB_SIZE)
    learned = tokenizer.mergeable[256:]  # in the order in which they were learned; the first 256 are the bytes
    print(f"\n1. tokenizer | first merges: {learned[:8]} | last: {learned[-3:]}")

    # a tokenizer that stopped earlier knows fewer tokens and cuts the same text finer
    for num_merges in (0, 5, 40):
        early = RustBPETokenizer(tokenizer.mergeable[:256 + num_merges])
        pieces = [early.id_to_token(token) for token in early.encode(" the river")]
        print(f"   after {num_merges:2d} merges: {'|'.join(pieces)}")
    return tokenizer


def show_conversation(tokenizer):
    """A chat is text between special tokens; only what the assistant writes is trained on. conversation.py"""
    messages = [{"role": "user", "content": "the owl"}, {"role": "assistant", "content": "the lake"}]
    ids, mask = tokenizer.render_conversation({"messages": messages})
    print(f"\n2. chat | {len(ids)} tokens, {sum(mask)} of them trained on")
    for token, trained in zip(ids, mask, strict=True):
        note = "  <- trained on" if trained else ""
        print(f"   {token:3d} {tokenizer.id_to_token(token)!r}{note}")


def pack(tokenizer):
    """Documents of any length become rows of T + 1 tokens, with nothing padded. packing.py, dataloader.py"""
    bos = tokenizer.get_bos_token_id()
    documents = [sentence.strip() + "." for sentence in PARAGRAPH.split(".") if sentence]
    pieces = [np.array(tokenizer.encode(text, prepend=bos), dtype=np.int32) for text in documents]
    rows, rest = pack_rows(pieces, bos, capacity=T + 1)
    inputs, targets = shift(rows)  # the target of each token is the token after it
    print(f"\n3. rows | {len(documents)} documents -> {rows.shape} tokens, {len(rest)} left over")
    print(f"   row 0: {tokenizer.decode(rows[0].tolist())!r}")
    print(f"   its first inputs {inputs[0, :5]} and targets {targets[0, :5]}")
    return inputs, targets


def make_model(device):
    """A Transformer of two layers: all sizes follow from the depth. gpt.py, ops.py"""
    config = GPTConfig.from_depth(2, VOCAB_SIZE, sequence_len=2 * T, head_dim=64)
    model = GPT.create(config, device)
    print(f"\n4. model | {config.n_layer} layers, width {config.n_embd}, {model.num_params():,} parameters")
    return model


def train(model, inputs, targets):
    """The loop of scripts/base_train.py in short: forward, backward, step. training.py, muon.py, adamw.py"""
    optimizers = model.setup_optimizers(embedding_lr=0.1, matrix_lr=0.04)
    print(f"\n5. train | the loss of a blind guess is ln {VOCAB_SIZE} = {math.log(VOCAB_SIZE):.3f}")
    for step in range(STEPS):
        set_rates(optimizers, lr_multiplier(step, STEPS, warmup_iters=5, warmdown_ratio=0.5))
        loss, _ = accumulate_gradients(model, inputs, targets, targets.size, device_batch_size=len(inputs))
        gradient_norm = optimizer_step(model, optimizers)
        if step in (0, 1, 9, STEPS - 1):
            print(f"   step {step:2d} | loss {loss.item():.3f} | norm of the gradient {gradient_norm:.2f}")


def sample(model, tokenizer, prompt="The"):
    """One token after the other, each drawn from the model's probabilities. engine.py, decoder.py, sampling.py"""
    ids = tokenizer.encode(prompt, prepend="<|bos|>")
    with torch.no_grad():
        logits = model(torch.tensor([ids], device=model.device), last_only=True)  # (1, 1, V)
    best = logits[0, 0].softmax(-1).topk(3)
    odds = []
    for probability, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        odds.append(f"{tokenizer.id_to_token(token)!r} {probability:.0%}")
    (row,), _ = Engine(model, tokenizer).generate_batch(ids, max_tokens=T, temperature=0.0)
    print(f"\n6. sample | after {prompt!r}: {', '.join(odds)}")
    print(f"   {tokenizer.decode(row[1:])!r}")


def main():
    _, _, _, device = compute_init("cpu")
    tokenizer = train_tokenizer()
    show_conversation(tokenizer)
    inputs, targets = pack(tokenizer)
    model = make_model(device)
    train(model, inputs, targets)
    sample(model, tokenizer)


if __name__ == "__main__":
    run_script(main)
