"""
How fast loading, training and decoding are on this machine, beside the goals of the project and peers from PyPI.

    python -m dev.bench_model --data=PATH                    a CPU: loader, training at d4, decoding at d12
    python -m dev.bench_model --parts=train,decode --depths=12,20 --seq=2048 --vocab=65536 --rows=16       a GPU
    NANOCHAT_PRECISION=fp8 python -m dev.bench_model --parts=train --depths=26 ...

Every figure is the best of a few repetitions: machines are shared, and what disturbs only makes things slower. Peers
run in the same process, in turn with ours. Nothing is downloaded; a peer that is not installed is left out and named.
"""

import time

import torch

from nanochat.common import compiles, compute_init, get_peak_flops, peak_memory_bytes, run_script, synchronize
from nanochat.configurator import override_from_cli
from nanochat.dataloader import shift, training_rows
from nanochat.dataset import get_spans, iter_texts
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
micro_rows: int = -1                # rows at once; -1 = all of a step's
decode_depth: int = 12              # size to decode with
decode_batches: str = "1,8,64"      # rows decoded at once
decode_tokens: int = 24             # steps timed
prompt_tokens: int = 256            # length of the prompt
repeats: int = 5                    # the best of so many
compile: bool | None = None         # torch.compile for training on a GPU; None = if Triton is there


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


def row(what, ours, goal="", peer=""):
    print(f"| {what} | {ours} | {goal} | {peer} |", flush=True)


def bench_load():
    """Tokens per second out of the loader alone, its encoding thread included, at two row lengths."""
    tokenizer = RustBPETokenizer.train_from_iterator(iter_texts(data, "train"), 32768)
    for T in (512, 2048):
        loader = training_rows(tokenizer, get_spans(data, "train"), T)
        loader.next_rows(64)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < 5:
            count += loader.next_rows(64).size
        loader.close()
        row(f"loading, T={T}, tok/s", f"{count / (time.perf_counter() - start):,.0f}", "1,000,000 on one core")


def bench_train(device):
    """Whole optimizer steps on random tokens: tokens per second, MFU, peak memory, seconds to the first step."""
    peak, source = get_peak_flops(device, get_precision_dtype(device.type))
    for depth in map(int, depths.split(",")):
        for V in map(int, vocab.split(",")):
            start = time.perf_counter()
            model = GPT.create(GPTConfig.from_depth(depth, V, seq), device)
            if get_precision(device.type) == "fp8":
                use_fp8(model)
            if compiles(device, compile):
                model.compile()
            optimizers = model.setup_optimizers()
            inputs, targets = shift(torch.randint(0, V, (rows, seq + 1)).numpy())

            def step(model=model, optimizers=optimizers, inputs=inputs, targets=targets):
                accumulate_gradients(model, inputs, targets, targets.size, micro_rows if micro_rows > 0 else rows)
                optimizer_step(model, optimizers)
            step()
            first_s = time.perf_counter() - start
            tok_per_s = rows * seq / best_of(step, device)
            goal = {(4, 32768): "8,000 with AMX", (4, 4096): "13,000 with AMX"}.get((depth, V), "")
            mfu = tok_per_s * model.estimate_flops() / peak
            row(f"training d{depth} V{V} B{rows} T{seq}, tok/s", f"{tok_per_s:,.0f}", goal,
                f"{100 * mfu:.0f}% of {peak:.2e} FLOP/s ({source}), first step after {first_s:.1f} s, "
                f"{peak_memory_bytes(device) / 2**30:.1f} GiB")


def bench_decode(device):
    """Decoding and prefill of ours and of a Llama of the same size in transformers, both in the compute dtype."""
    dtype = get_precision_dtype(device.type)
    config = GPTConfig.from_depth(decode_depth, 65536, 2048)
    model = prepare(GPT.create(config, device))
    if compiles(device):
        compile_decoding(model)
    engine = Engine(model, RustBPETokenizer.train_from_iterator(iter(["the only text there is"]), 265))
    peer = _make_peer(config, device, dtype)
    goals = {1: 70, 8: 300, 64: 900}
    prompt = torch.randint(0, 200, (prompt_tokens,)).tolist()
    prefill_s = best_of(lambda: _run(engine, prompt, 1, 1), device)
    theirs = _peer_seconds(peer, prompt, 1, 1, device) if peer else None
    row(f"prefill d{decode_depth}, tok/s", f"{prompt_tokens / prefill_s:,.0f}", "4,000 with AMX",
        f"transformers Llama {prompt_tokens / theirs:,.0f}" if theirs else "transformers is not installed")
    for B in map(int, decode_batches.split(",")):
        first_s = best_of(lambda B=B: _run(engine, prompt, B, 1), device)  # the prompt, and a cache for B rows
        seconds = best_of(lambda B=B: _run(engine, prompt, B, decode_tokens + 1), device) - first_s
        ours = B * decode_tokens / seconds
        peers = ""
        if peer:
            peers = B * decode_tokens / (_peer_seconds(peer, prompt, B, decode_tokens + 1, device)
                                         - _peer_seconds(peer, prompt, B, 1, device))
            peers = f"transformers Llama {peers:,.0f}"
        weights = model.num_matrix_params() * dtype.itemsize
        row(f"decode d{decode_depth} B{B}, tok/s", f"{ours:,.1f} ({ours / B * weights / 1e9:.0f} GB/s of weights)",
            f"{goals.get(B, '')} with AMX", peers)


def _run(engine, prompt, B, max_tokens):
    made = [engine.make_row(prompt, Sampling(0), max_tokens, stop_tokens=()) for _ in range(B)]
    for _ in engine.generate_rows(made, B):
        pass


def _make_peer(config, device, dtype):
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    llama = LlamaConfig(vocab_size=config.vocab_size, hidden_size=config.n_embd, num_hidden_layers=config.n_layer,
                        intermediate_size=8 * config.n_embd // 3, num_attention_heads=config.n_head,
                        max_position_embeddings=config.sequence_len)
    return LlamaForCausalLM(llama).to(device, dtype).eval()


@torch.inference_mode()
def _peer_seconds(peer, prompt, B, max_tokens, device):
    ids = torch.tensor([prompt] * B, device=device)
    return best_of(lambda: peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens,
                                         min_new_tokens=max_tokens, do_sample=False, pad_token_id=0), device)


def main():
    _, _, _, device = compute_init()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name} | torch {torch.__version__} | precision: {get_precision(device.type)}\n")
    print("| what | measured | goal | beside it |\n|---|---|---|---|", flush=True)
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
