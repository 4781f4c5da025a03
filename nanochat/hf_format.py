"""
The folder in which `transformers` keeps a model, and how its parts correspond to ours: the fields of
config.json, the names of tensors, the chat templates. scripts/export_hf writes such a folder,
scripts/import_hf reads one.

transformers' NanoChatForCausalLM (5.0 or newer) computes what our default architecture does. A
model with value embeddings takes a file of ours along, which adds them to that class. mlx-lm knows
the same architecture, but by our names of tensors.
"""

import re
from pathlib import Path

import torch

from nanochat.common import UserError
from nanochat.gpt import ROPE_BASE, GPTConfig
from nanochat.ops import LOGIT_CAP

FILES = Path(__file__).parent / "hf_files"  # what a folder takes along, and the model card

# Our architectures as model_type in config.json; the second needs the modelling file
NANOCHAT = "nanochat"
VALUE_EMBEDS = "nanochat_value_embeds"
MODELLING_FILE = "modeling_nanochat_value_embeds.py"

# -----------------------------------------------------------------------------
# config.json

# The fields of GPTConfig by their names there; value_embeds is in model_type
FIELDS = {
    "sequence_len": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
}

# What GPT computes in any case. Where a field is missing, transformers takes the same
FIXED = {
    "hidden_act": "relu2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "final_logit_softcapping": LOGIT_CAP,
    "tie_word_embeddings": False,
}

# Of RMSNorm. Folders with more, up to the maximum, are read: their logits change by less than 0.001
NORM_EPS = torch.finfo(torch.float32).eps
MAX_NORM_EPS = 1e-5


def config_to_hf(config):
    """The architecture's part of config.json, from our GPTConfig."""
    content = {"model_type": NANOCHAT, "architectures": ["NanoChatForCausalLM"]}
    if config.value_embeds:
        name = "NanoChatValueEmbeds"
        module = MODELLING_FILE.removesuffix(".py")
        content = {
            "model_type": VALUE_EMBEDS,
            "architectures": [f"{name}ForCausalLM"],
            "auto_map": {
                "AutoConfig": f"{module}.{name}Config",
                "AutoModelForCausalLM": f"{module}.{name}ForCausalLM",
            },
        }
    for ours, theirs in FIELDS.items():
        content[theirs] = getattr(config, ours)
    content.update(FIXED)
    content["intermediate_size"] = 4 * config.n_embd
    content["head_dim"] = config.head_dim
    content["rms_norm_eps"] = NORM_EPS
    content["rope_parameters"] = {"rope_type": "default", "rope_theta": ROPE_BASE}
    return content


def config_from_hf(content):
    """
    Our GPTConfig from the content of a config.json. UserError if it is of another architecture.
    """
    model_type = content.get("model_type")
    if model_type not in (NANOCHAT, VALUE_EMBEDS):
        raise UserError(f"config.json has model_type {model_type!r}, needed: {NANOCHAT!r}")

    # The sizes
    sizes = {}
    for ours, theirs in FIELDS.items():
        sizes[ours] = content.get(theirs)
    if sizes["n_kv_head"] is None:
        sizes["n_kv_head"] = sizes["n_head"]
    wrong = [ours for ours, size in sizes.items() if not isinstance(size, int) or size < 1]
    if wrong:
        names = ", ".join(FIELDS[ours] for ours in wrong)
        raise UserError(f"config.json needs a whole number above 0 for {names}")
    config = GPTConfig(**sizes, value_embeds=model_type == VALUE_EMBEDS)

    # All else must be as our model has it
    needed = config_to_hf(config)
    found = content | _read_rope(content)
    for name in (*FIXED, "intermediate_size", "head_dim", "rope_parameters"):
        value = found.get(name, needed[name])
        if value != needed[name]:
            raise UserError(f"config.json has {name} {value!r}, needed: {needed[name]!r}")
    eps = content.get("rms_norm_eps", NORM_EPS)
    if not isinstance(eps, float) or eps > MAX_NORM_EPS:
        raise UserError(f"config.json has rms_norm_eps {eps!r}, needed: at most {MAX_NORM_EPS}")
    return config


def _read_rope(content):
    """The field rope_parameters in one form. Older folders have rope_theta instead."""
    rope = content.get("rope_parameters") or {}
    return {
        "rope_parameters": {
            **rope,
            "rope_type": rope.get("rope_type", "default"),
            "rope_theta": rope.get("rope_theta", content.get("rope_theta", ROPE_BASE)),
        }
    }


# -----------------------------------------------------------------------------
# Tensors. Nothing is transposed

# Names of the matrices of a layer
LAYER_NAMES = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def tensor_names(config):
    """{our name: transformers' name} of every tensor of a model."""
    names = {
        "transformer.wte.weight": "model.embed_tokens.weight",
        "lm_head.weight": "lm_head.weight",
    }
    for layer in range(config.n_layer):
        for ours, theirs in LAYER_NAMES.items():
            names[f"transformer.h.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
        if config.value_embeds:
            theirs = f"model.layers.{layer}.self_attn.value_embed.weight"
            names[f"transformer.value_embeds.{layer}.weight"] = theirs
    return names


def has_token_rows(name):
    """Whether the rows of a tensor, by our name, are tokens: we pad these tables, others do not."""
    return name.startswith(("transformer.wte.", "transformer.value_embeds.", "lm_head."))


# -----------------------------------------------------------------------------
# Chat templates


def chat_template():
    """
    The chat template for transformers: the rule of conversation.py, with `generation` around what
    the assistant itself writes, so that trainers find it.
    """
    return (FILES / "chat_template.jinja").read_text(encoding="utf-8")


def plain_template(template):
    """A chat template without `generation`, which only transformers and its relatives know."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
