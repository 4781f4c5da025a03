"""
Write a checkpoint as a folder that other tools load.

    python -m scripts.export_hf --source=sft --out=my_model
    python -m scripts.export_hf --source=base --model_tag=d20 --dtype=float32 --out=my_base_model
    python -m scripts.export_hf --source=sft --flavor=mlx --out=my_mlx_model

The flavor `transformers` is for transformers (5.0 or newer) and what is built on it: lm-evaluation-harness, peft, trl,
vLLM. It needs no remote code, except for a model with value embeddings, with which a modelling file goes out. The
flavor `mlx` is for mlx-lm. Tensors are renamed, and nothing is computed.

Token ids are the same with one exception: those tools first render a conversation to one text and then encode it, so a
message that spells a special token gets that token (here it stays text). The folder's README.md shows how to prevent
it, and how to run the model's calls of the calculator.
"""

import json
import shutil
from pathlib import Path
from typing import Literal

import jinja2
import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from nanochat import calculator, hf_format
from nanochat.checkpoint_manager import CheckpointManager, find_checkpoint_dir
from nanochat.common import UserError, get_base_dir, run_script
from nanochat.configurator import get_settings, override_from_cli
from nanochat.gpt import ROPE_BASE
from nanochat.progress import show_progress
from nanochat.tokenizer import HuggingFaceTokenizer
from nanochat.tokenizer_readers import read_outcomes, reader_lines

# -----------------------------------------------------------------------------
# Settings
source: str = "sft"             # stage of the checkpoint: base, mid, sft or rl
model_tag: str | None = None    # model to load; None = the one saved last
model_step: int | None = None   # step to load; None = the last
out: str | None = None          # folder to write, new or empty; None = <base dir>/hf_export/<tag>_<source>
dtype: Literal["bfloat16", "float32"] = "bfloat16"      # of the weights
flavor: Literal["transformers", "mlx"] = "transformers"  # for which tools

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

# Where an answer ends, as in our engine; a base model knows only the <|bos|> of the next document. At
# <|python_end|> the calculator of our engine takes over: elsewhere the caller does
CHAT_STOPS = ("<|assistant_end|>", "<|bos|>", "<|python_end|>")
BASE_STOPS = ("<|bos|>",)

# Not <|bos|>: where there is no mask, transformers takes every pad token for padding, also the first
# token of a text
PAD_TOKEN = "<|assistant_end|>"


def export_weights(model, weights_dtype=torch.float32, flavor="transformers"):
    """{name in that flavor: tensor}, without the rows that pad our vocabulary."""
    names = hf_format.tensor_names(model.config)
    weights = {}
    for name, tensor in show_progress(model.state_dict().items(), "converting", "tensors"):
        if hf_format.has_token_rows(name):
            tensor = tensor[: model.config.vocab_size]
        new_name = name if flavor == "mlx" else names[name]
        weights[new_name] = tensor.detach().to(weights_dtype).contiguous()
    return weights


def export_configs(config, tokenizer, stage, dtype_name, flavor="transformers"):
    """{file name: content} of the JSON files, from our GPTConfig."""
    stops = BASE_STOPS if stage == "base" else CHAT_STOPS
    bos = tokenizer.get_bos_token_id()
    eos = [tokenizer.encode_special(name) for name in stops]

    model_config = {
        **hf_format.config_to_hf(config),
        "dtype": dtype_name,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": None,  # with one, transformers would give its embedding no gradient
    }
    if flavor == "mlx":
        model_config["rope_theta"] = ROPE_BASE  # where mlx-lm looks for it
    generation_config = {
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": tokenizer.encode_special(PAD_TOKEN),
        "do_sample": True,  # the defaults of chat_cli
        "temperature": 0.6,
        "top_k": 50,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.sequence_len,
        "bos_token": "<|bos|>",
        "eos_token": stops[0],
        "pad_token": PAD_TOKEN,
        "padding_side": "left",  # `generate` writes on at the right
        "additional_special_tokens": tokenizer.get_special_tokens(),
        "clean_up_tokenization_spaces": False,
    }
    return {
        "config.json": model_config,
        "generation_config.json": generation_config,
        "tokenizer_config.json": tokenizer_config,
    }


def export_tokenizer(tokenizer):
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


def model_card(name, stage, meta, config, num_params, readers, flavor="transformers"):
    """
    README.md: the facts recorded in the checkpoint, and how to use it. readers: read_outcomes.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(hf_format.FILES),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("model_card.md.j2").render(
        name=name,
        stage=stage,
        config=config,
        num_params=num_params,
        readers=readers,
        flavor=flavor,
        step=meta["step"],
        iterations=meta.get("iterations"),
        tokens=meta.get("progress", {}).get("tokens"),  # of base and mid; SFT and RL count conversations
        data=meta.get("data", "data that was not recorded"),
        imported_from=meta.get("imported_from"),
        max_new_tokens=min(256, config.sequence_len // 2),
    )


def text_files(config, tokenizer, stage, dtype_name, flavor):
    """{file name: text} of the folder, except the model card."""
    texts = {}
    configs = export_configs(config, tokenizer, stage, dtype_name, flavor)
    if stage != "base":
        # Tools that do not know the file chat_template.jinja do not know its `generation` either
        template = hf_format.chat_template()
        plain = hf_format.plain_template(template)
        configs["tokenizer_config.json"]["chat_template"] = plain
        texts["chat_template.jinja"] = template
        texts["chat_template_plain.jinja"] = plain
        texts["calculator.py"] = Path(calculator.__file__).read_text(encoding="utf-8")
    for filename, content in configs.items():
        texts[filename] = json.dumps(content, indent=2) + "\n"
    texts["tokenizer.json"] = export_tokenizer(tokenizer).to_str(pretty=True)
    if config.value_embeds:
        file = hf_format.FILES / hf_format.MODELLING_FILE
        texts[file.name] = file.read_text(encoding="utf-8")
    return texts


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
    # Settings
    get_settings(globals())  # checks them
    checkpoint_dir = find_checkpoint_dir(source, model_tag)
    if out is None:
        folder = get_base_dir() / "hf_export" / f"{checkpoint_dir.name}_{source}"
    else:
        folder = Path(out).expanduser()
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists already and is not an empty folder", "choose another one with --out=PATH")

    # Load the float32 weights, whatever this machine computes in
    manager = CheckpointManager(checkpoint_dir)
    step, meta = manager.load_meta(model_step)
    model = manager.load_model("cpu", step)
    tokenizer = manager.load_tokenizer(step)
    if flavor == "mlx" and model.config.value_embeds:
        raise UserError("mlx-lm has no value embeddings (value_embeds) in its nanochat",
                        "--flavor=transformers exports this model")

    # Convert
    weights = export_weights(model, DTYPES[dtype], flavor)
    num_params = sum(tensor.numel() for tensor in weights.values())
    texts = text_files(model.config, tokenizer, source, dtype, flavor)
    readers = read_outcomes(tokenizer.pattern)
    texts["README.md"] = model_card(folder.name, source, meta, model.config, num_params, readers, flavor)

    write_folder(folder, texts, weights)
    print(f"wrote {checkpoint_dir.name}, {source} step {step}, {num_params:,} parameters in {dtype}, to {folder}")
    print("its tokenizer.json in other tools:", *reader_lines(tokenizer.pattern), sep="\n  ")


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
