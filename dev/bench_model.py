"""
The speed of loading, training and decoding on this machine, beside the goals of the project and a peer from PyPI.

    python -m dev.bench_model --data=PATH                    a CPU: loader, training at d4, decoding at d12
    python -m dev.bench_model --parts=train,decode --depths=12,20 --seq=2048 --vocab=65536 --rows=16       a GPU
    NANOCHAT_PRECISION=fp8 python -m dev.bench_model --parts=train --depths=26 ...

Every figure is the best of a few repetitions, since other load on a shared machine can only make things slower. The
peer runs in the same process, in turn with ours. Nothing is downloaded; a peer that is not installed is left out.
"""

import time

import torch

from nanochat.common import compiles, compute_init, peak_memory_bytes, run_script, synchronize
from nanochat.configurator import override_from_cli
from nanochat.dataloader import shift, training_rows
from nanochat.dataset import get_spans, iter_texts
from nanochat.device_speed import get_peak_flops
from nanochat.engine import Engine, Sampling
from nanochat.fp8 import use_fp8
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference import compile_decoding, prepare
from nanochat.precision import get_precision, get_precision_dtype
from nanochat.tokenizer import RustBPETokenizer
from nanochat.training import accumulate_gradients, optimizer_step

parts: str = "load,train,decode"    # what to measure
data: str | None = None             # text for the loader and for training a tokenizer; None = the default corpus
depths: str = "4"                   # sizes to train, separated by commas
vocab: str = "32768,4096"           # vocabularies to train with
seq: int = 512                      # context while training
rows: int = 8                       # rows per step
micro_rows: int = -1                # rows per micro-batch; -1 = all of a step's
decode_depth: int = 12              # size to decode with
decode_batches: str = "1,8,64"      # rows decoded at once
decode_tokens: int = 24             # steps timed
prompt_tokens: int = 256            # length of the prompt
repeats: int = 5                    # repetitions; the fastest counts
compile: bool | None = None         # torch.compile for training on a GPU; None = if Triton is there

# Goals in tokens per second, set on a machine of 2 cores with AMX
TRAIN_GOALS = {(4, 32768): "8,000 with AMX", (4, 4096): "13,000 with AMX"}  # (depth, vocabulary)
DECODE_GOALS = {1: "70 with AMX", 8: "300 with AMX", 64: "900 with AMX"}  # rows decoded at once


def best_of(function, device, warmup=1):
    """Seconds of the fastest of `repeats` calls, after warming up."""
    times = []
    for _ in range(warmup + repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[warmup:])


def print_row(name, ours, goal="", peer=""):
    print(f"| {name} | {ours} | {goal} | {peer} |", flush=True)


def bench_load():
    """Tokens per second of the loader alone, its encoding thread included, at two row lengths."""
    tokenizer = RustBPETokenizer.train_from_iterator(iter_texts(data, "train"), 32768)
    for T in (512, 2048):
        loader = training_rows(tokenizer, get_spans(data, "train"), T)
        loader.next_rows(64)  # warm up
        count = 0
        start = time.perf_counter()
        while time.perf_counter() - start < 5:
            count += loader.next_rows(64).size
        seconds = time.perf_counter() - start
        loader.close()
        print_row(f"loading, T={T}, tok/s", f"{count / seconds:,.0f}", "1,000,000 on one core")


def bench_train(device):
    """Whole optimizer steps on random tokens: tokens per second, MFU, peak memory, seconds to the first step."""
    peak_flops = get_peak_flops(device, get_precision_dtype(device.type))
    for depth in depths.split(","):
        for V in vocab.split(","):
            bench_train_size(int(depth), int(V), device, peak_flops)


def bench_train_size(depth, V, device, peak_flops):
    """One row of bench_train. peak_flops: as get_peak_flops returns it."""
    peak, source = peak_flops
    start = time.perf_counter()
    model = GPT.create(GPTConfig.from_depth(depth, V, seq), device)
    if get_precision(device.type) == "fp8":
        use_fp8(model)
    if compiles(device, compile):
        model.compile()
    optimizers = model.setup_optimizers()
    inputs, targets = shift(torch.randint(0, V, (rows, seq + 1)).numpy())  # (rows, seq) each
    batch_rows = micro_rows if micro_rows > 0 else rows

    def step():
        accumulate_gradients(model, inputs, targets, targets.size, batch_rows)
        optimizer_step(model, optimizers)

    step()
    first_s = time.perf_counter() - start
    tok_per_s = rows * seq / best_of(step, device)
    mfu = tok_per_s * model.estimate_flops() / peak
    memory = peak_memory_bytes(device) / 2**30
    print_row(
        f"training d{depth} V{V} B{rows} T{seq}, tok/s",
        f"{tok_per_s:,.0f}",
        TRAIN_GOALS.get((depth, V), ""),
        f"{100 * mfu:.0f}% of {peak:.2e} FLOP/s ({source}), first step after {first_s:.1f} s, {memory:.1f} GiB",
    )


def bench_decode(device):
    """Prefill and decoding of our model and of a Llama of the same size in transformers, both in the compute dtype."""
    dtype = get_precision_dtype(device.type)
    config = GPTConfig.from_depth(decode_depth, 65536, 2048)
    model = GPT.create(config, device).eval()
    prepare(model)
    if compiles(device):
        compile_decoding(model)
    engine = Engine(model, RustBPETokenizer.train_from_iterator(iter(["the only text there is"]), 265))
    peer = make_peer(config, device, dtype)
    prompt = torch.randint(0, 200, (prompt_tokens,)).tolist()

    # prefill: the prompt and one token
    ours = prompt_tokens / best_of(lambda: generate(engine, prompt, 1, 1), device)
    beside = "transformers is not installed"
    if peer:
        beside = f"transformers Llama {prompt_tokens / peer_seconds(peer, prompt, 1, 1, device):,.0f}"
    print_row(f"prefill d{decode_depth}, tok/s", f"{ours:,.0f}", "4,000 with AMX", beside)

    # decoding: the time of the prompt and a cache of the same size is taken off
    weight_bytes = model.num_matrix_params() * dtype.itemsize  # read once per step
    for B in map(int, decode_batches.split(",")):
        first_s = best_of(lambda B=B: generate(engine, prompt, B, 1), device)
        all_s = best_of(lambda B=B: generate(engine, prompt, B, decode_tokens + 1), device)
        ours = B * decode_tokens / (all_s - first_s)
        beside = ""
        if peer:
            first_s = peer_seconds(peer, prompt, B, 1, device)
            all_s = peer_seconds(peer, prompt, B, decode_tokens + 1, device)
            beside = f"transformers Llama {B * decode_tokens / (all_s - first_s):,.0f}"
        bandwidth = ours / B * weight_bytes / 1e9
        print_row(f"decode d{decode_depth} B{B}, tok/s", f"{ours:,.1f} ({bandwidth:.0f} GB/s of weights)",
                  DECODE_GOALS.get(B, ""), beside)


def generate(engine, prompt, B, max_tokens):
    """Greedy decoding of B equal rows, to the end."""
    generated = [engine.make_row(prompt, Sampling(0), max_tokens, stop_tokens=()) for _ in range(B)]
    for _ in engine.generate_rows(generated, B):
        pass


def make_peer(config, device, dtype):
    """A Llama of transformers of the same size, or None if transformers is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        num_hidden_layers=config.n_layer,
        intermediate_size=8 * config.n_embd // 3,  # its MLP has three matrices instead of two
        num_attention_heads=config.n_head,
        max_position_embeddings=config.sequence_len,
    )
    return LlamaForCausalLM(llama).to(device, dtype).eval()


@torch.inference_mode()
def peer_seconds(peer, prompt, B, max_tokens, device):
    ids = torch.tensor([prompt] * B, device=device)
    settings = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": max_tokens,
        "min_new_tokens": max_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    return best_of(lambda: peer.generate(ids, **settings), device)


def main():
    _, _, _, device = compute_init()
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    print(f"{name} | torch {torch.__version__} | precision: {get_precision(device.type)}\n")
    print("| benchmark | measured | goal | beside it |\n|---|---|---|---|", flush=True)
    chosen = parts.split(",")
    if "load" in chosen:
        bench_load()
    if "train" in chosen:
        bench_train(device)
    if "decode" in chosen:
        bench_decode(device)


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
