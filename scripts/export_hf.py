"""
Write a checkpoint as a folder that transformers, and tools built on it, load without remote code.

    python -m scripts.export_hf --source=sft --out=my_model
    python -m scripts.export_hf --source=base --model_tag=d20 --dtype=float32 --out=my_base_model

Our architecture is transformers' NanoChatForCausalLM (5.0 or newer): tensors are renamed, and nothing is computed.
Token ids are the same with two exceptions, since those tools first render a conversation to one text and then encode
it. A message that spells a special token gets that token (here it stays text). Neighbouring text parts of an
assistant's message are encoded as one text (here each is encoded alone). The calculator is part of our engine:
elsewhere a model makes up the results of its calls.
"""

import json
import shutil
from pathlib import Path

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from nanochat.checkpoint_manager import CheckpointManager, find_checkpoint_dir
from nanochat.common import UserError, get_base_dir, run_script
from nanochat.configurator import override_from_cli
from nanochat.gpt import ROPE_BASE, GPTConfig
from nanochat.ops import LOGIT_CAP
from nanochat.tokenizer import HuggingFaceTokenizer

# -----------------------------------------------------------------------------
# Settings
source: str = "sft"             # stage of the checkpoint: base, mid, sft or rl
model_tag: str | None = None    # model to load; None = the one saved last
model_step: int | None = None   # step to load; None = the last
out: str | None = None          # folder to write, new or empty; None = <base dir>/hf_export/<tag>_<source>
dtype: str = "bfloat16"         # of the weights: bfloat16 or float32

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

# The fields of GPTConfig that transformers' class has; any other field must have its default
EXPRESSIBLE = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")

# Our names of modules and theirs
HF_NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.h": "model.layers",
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

# Tokenizer.render_conversation as a template; with add_generation_prompt, render_for_completion. The content of every
# role may be a list of parts, since some servers send no other form.
CHAT_TEMPLATE = r"""
{%- set fences = {'python': 'python', 'python_output': 'output'} -%}
{%- set first = 1 if messages and messages[0].role == 'system' else 0 -%}
{%- if messages | length == first -%}{{- raise_exception('a conversation needs a user message') -}}{%- endif -%}
{{- bos_token -}}
{%- for message in messages -%}
  {%- set needed = 'system' if loop.index0 < first else 'user' if (loop.index0 - first) % 2 == 0 else 'assistant' -%}
  {%- if message.role != needed or message.content is not defined -%}
    {{- raise_exception('message ' ~ loop.index0 ~ ' needs the role ' ~ needed ~ ' and a content') -}}
  {%- endif -%}
  {%- if not (add_generation_prompt and loop.last and needed == 'assistant') -%}
    {%- set role = 'assistant' if needed == 'assistant' else 'user' -%}
    {{- '\n\n' if first and loop.index0 == 1 else '<|' ~ role ~ '_start|>' -}}
    {%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}
    {%- for part in parts -%}
      {%- set fence = fences[part.type] if role == 'assistant' -%}
      {%- if part.type == 'text' -%}{{- part.text -}}
      {%- elif fence -%}{{- '<|' ~ fence ~ '_start|>' ~ part.text ~ '<|' ~ fence ~ '_end|>' -}}
      {%- else -%}{{- raise_exception('a part of this type cannot be in a message of role ' ~ needed) -}}{%- endif -%}
    {%- endfor -%}
    {{- '' if needed == 'system' else '<|' ~ role ~ '_end|>' -}}
  {%- endif -%}
{%- endfor -%}
{{- '<|assistant_start|>' if add_generation_prompt -}}
""".strip()


def check_expressible(model_config):
    """UserError if a checkpoint's config (a dict) uses a field that transformers' class does not have."""
    extra = []
    for name, value in model_config.items():
        if name not in EXPRESSIBLE and value != getattr(GPTConfig, name, None):
            extra.append(f"{name}={value}")
    if extra:
        raise UserError(
            f"transformers' NanoChatForCausalLM cannot express {', '.join(extra)} of this checkpoint",
            "export a model that was trained without it",
        )


def hf_weights(model, weights_dtype=torch.float32):
    """{name in transformers: tensor}, without the rows that pad our vocabulary. Nothing is transposed."""
    weights = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in HF_NAMES.items():
            name = name.replace(ours, theirs)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = tensor[: model.config.vocab_size]
        weights[name] = tensor.detach().to(weights_dtype).contiguous()
    return weights


def hf_configs(config, tokenizer, stage, dtype_name):
    """{file name: content} of the JSON files, from our GPTConfig."""
    # the tokens that end an answer, as in our engine; a base model knows only the <|bos|> of the next document
    stop_names = ["<|bos|>"] if stage == "base" else ["<|assistant_end|>", "<|bos|>"]
    bos = tokenizer.get_bos_token_id()
    eos = [tokenizer.encode_special(name) for name in stop_names]

    model_config = {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "dtype": dtype_name,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.sequence_len,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "hidden_act": "relu2",
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.n_embd // config.n_head,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": torch.finfo(torch.float32).eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
        "final_logit_softcapping": LOGIT_CAP,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": None,  # with one, transformers would give its embedding no gradient
    }
    generation_config = {
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": bos,
        "do_sample": True,  # the defaults of chat_cli
        "temperature": 0.6,
        "top_k": 50,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.sequence_len,
        "bos_token": "<|bos|>",
        "eos_token": stop_names[0],
        "pad_token": "<|bos|>",
        "additional_special_tokens": tokenizer.get_special_tokens(),
        "clean_up_tokenization_spaces": False,
    }
    if stage != "base":
        tokenizer_config["chat_template"] = CHAT_TEMPLATE
    return {
        "config.json": model_config,
        "generation_config.json": generation_config,
        "tokenizer_config.json": tokenizer_config,
    }


def hf_tokenizer(tokenizer):
    """tokenizer.json: our pattern, ranks and special tokens. Every text gets <|bos|> in front, as in training."""
    # our own class encodes by this same object, which knows no special token until here
    core = HuggingFaceTokenizer(tokenizer.mergeable, tokenizer.pattern).core
    names = tokenizer.get_special_tokens()
    core.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
    core.decoder = tokenizers.decoders.ByteLevel()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|bos|> $A",
        pair="<|bos|> $A $B",
        special_tokens=[("<|bos|>", tokenizer.get_bos_token_id())],
    )
    return core


def model_card(name, stage, meta, model, num_params):
    """README.md: the facts recorded in the checkpoint, and how to use it."""
    c = model.config
    trained = f"step {meta['step']:,}"
    if "iterations" in meta:
        trained += f" of {meta['iterations']:,}"
    if "tokens" in meta.get("progress", {}):  # base and mid; SFT and RL count conversations
        trained += f", {meta['progress']['tokens']:,} tokens"

    if stage == "base":
        prompt = 'tokenizer("Once upon a time", return_tensors="pt")'
    else:
        prompt = ('tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}],\n'
                  '    add_generation_prompt=True, return_dict=True, return_tensors="pt")')
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [nanochat]
---
# {name}

A language model trained from scratch with nanochat.

| | |
|---|---|
| stage | {stage}, of base, mid, sft, rl |
| trained in this stage | {trained}; on {meta.get("data", "data that was not recorded")} |
| parameters | {num_params:,} |
| shape | depth {c.n_layer}, width {c.n_embd}, {c.n_head} query heads, {c.n_kv_head} key and value heads |
| context, vocabulary | {c.sequence_len:,} tokens, {c.vocab_size:,} tokens |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer  # 5.0 or newer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = {prompt}
output = model.generate(**inputs, max_new_tokens={min(256, c.sequence_len // 2)})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

- Text that spells a special token, such as `<|assistant_end|>`, becomes that token: remove it from untrusted text, or
  encode with `split_special_tokens=True`, which keeps it as text.
- A chat model may write a calculation between `<|python_start|>` and `<|python_end|>`. nanochat's engine then inserts
  `<|output_start|>`, the result and `<|output_end|>`. In other engines the model makes up a result, unless you stop at
  `<|python_end|>` and do the same.
"""


def write_folder(folder, texts, weights):
    """Write the files under a temporary name, then rename: a folder of this name is always whole."""
    temporary = folder.with_name(f".tmp_{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for filename, text in texts.items():
            (temporary / filename).write_text(text, encoding="utf-8")
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        # safetensors makes its file readable for the owner alone
        mode = (temporary / "config.json").stat().st_mode
        (temporary / "model.safetensors").chmod(mode)
        if folder.exists():
            folder.rmdir()  # it is empty
        temporary.rename(folder)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main():
    # settings
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype} is unknown", f"use one of {', '.join(DTYPES)}")
    checkpoint_dir = find_checkpoint_dir(source, model_tag)
    if out is None:
        folder = get_base_dir() / "hf_export" / f"{checkpoint_dir.name}_{source}"
    else:
        folder = Path(out).expanduser()
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists already and is not an empty folder", "choose another one with --out=PATH")

    # load the float32 weights, whatever this machine computes in
    manager = CheckpointManager(checkpoint_dir)
    step, meta = manager.load_meta(model_step)
    check_expressible(meta["model_config"])
    model = manager.load_model("cpu", step)
    tokenizer = manager.load_tokenizer(step)

    # convert
    weights = hf_weights(model, DTYPES[dtype])
    num_params = sum(tensor.numel() for tensor in weights.values())
    texts = {}  # file name -> text
    for filename, content in hf_configs(model.config, tokenizer, source, dtype).items():
        texts[filename] = json.dumps(content, indent=2) + "\n"
    texts["tokenizer.json"] = hf_tokenizer(tokenizer).to_str(pretty=True)
    texts["README.md"] = model_card(folder.name, source, meta, model, num_params)

    write_folder(folder, texts, weights)
    print(f"wrote {checkpoint_dir.name}, {source} step {step}, {num_params:,} parameters in {dtype}, to {folder}")


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
