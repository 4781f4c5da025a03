"""
Make a checkpoint of a NanoChat model in the format of transformers, which all other scripts then take.

    python -m scripts.import_hf --model=my_model --stage=sft
    python -m scripts.import_hf --model=karpathy/nanochat-d32 --stage=sft --model_tag=d32
    python -m scripts.chat_cli -i sft -g d32 -p "Why is the sky blue?"

--model is a folder that export_hf or transformers wrote, or a name on the Hugging Face hub. Weights become float32.
What could make the model another one is refused, by name: another architecture, missing tensors, a tokenizer that
encodes text differently here, a chat template that writes a conversation differently. Without the state of the
optimizers the run that trained the model cannot be resumed; the next stage can start from it.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jinja2
import tokenizers
import torch
import torch.nn.functional as F
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError
from safetensors.torch import load_file

from nanochat import hf_format
from nanochat.checkpoint_manager import CheckpointManager, get_checkpoint_dir
from nanochat.common import UserError, run_script
from nanochat.configurator import get_settings, override_from_cli
from nanochat.download import hub_endpoint, hub_errors, retry
from nanochat.gpt import GPT
from nanochat.progress import show_progress
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer, byte_characters

# -----------------------------------------------------------------------------
# Settings
model: str = ""                 # folder, or name on the Hugging Face hub
revision: str | None = None     # on the hub: branch, tag or commit; None = the newest
stage: Literal["base", "mid", "sft", "rl"] = "sft"  # stage to save the model as
model_tag: str | None = None    # name to save the model under; None = the name of the folder

NEEDED_FILES = ["*.json", "*.jinja", "*.safetensors"]  # of a repository on the hub

# Where splitting and merging go wrong first; the texts of all tokens are compared as well
AWKWARD_TEXTS = (
    "", " ", "  \n\n \t x", "It's, we'LL, I'd've", "1 12 123 1234567", "a1b22c333", "x = {'k': [1, 2.5]}\r\n\r\n",
    "Grüße, Ελλάδα, 東京, नमस्ते", "👩\u200d🚀 e\u0301 \u00a0\u2028", "aaaaaaaaaaaaaaaa", "...!?--//", "<|bos|",
)

QUESTION = {"role": "user", "content": "Hi, what is 2+3?"}
ANSWER = {"role": "assistant", "content": "It is 5."}
CALL = {"role": "assistant", "content": [
    {"type": "text", "text": "It is "},
    {"type": "python", "text": "2+3"},
    {"type": "python_output", "text": "5"},
    {"type": "text", "text": "."},
]}
# What a template must write as we do, and what is only said if it does not
EXCHANGE = [QUESTION, ANSWER, {"role": "user", "content": "Thanks."}]
FURTHER = {
    "a system message": [{"role": "system", "content": "Be kind."}, QUESTION],
    "calls of the calculator": [QUESTION, CALL],
}

# -----------------------------------------------------------------------------
# The folder


def find_folder():
    """(folder of --model, its name); a repository of the hub is downloaded."""
    folder = Path(model).expanduser().resolve()
    if model and folder.is_dir():
        return folder, folder.name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise UserError(
            f"--model={model!r} is neither a folder nor a name on the Hugging Face hub",
            "--model=my_model for a folder, --model=OWNER/NAME for the hub",
        )

    from huggingface_hub import snapshot_download  # reads the environment when it is imported

    def download():
        with hub_errors(model):
            return snapshot_download(
                model, revision=revision, allow_patterns=NEEDED_FILES, endpoint=hub_endpoint())

    return Path(retry(download, model)), model


def read_json(path):
    """The content of a JSON file, an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}", "choose the folder of a NanoChat model") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, needed: an object")
    return content


# -----------------------------------------------------------------------------
# The tokenizer


def read_tokenizer(folder):
    """(our tokenizer, the library's own) from tokenizer.json, which encode alike."""
    path = folder / "tokenizer.json"
    content = read_json(path)
    try:
        core = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library's errors are plain Exceptions
        raise UserError(f"{path} is no tokenizer: {error}") from error
    parts = tokenizer_parts(content, core.get_vocab(), path)
    try:
        tokenizer = RustBPETokenizer(*parts)
    except ValueError as error:
        raise UserError(f"{path} cannot be used here: {error}") from error

    # Every token and the awkward texts, without special tokens
    texts = list(AWKWARD_TEXTS)
    texts += [tokenizer.id_to_token(token_id) for token_id in range(len(tokenizer.mergeable))]
    ours = tokenizer.encode(texts)
    theirs = core.encode_batch(texts, add_special_tokens=False)
    for text, our_ids, their_encoding in zip(texts, ours, theirs, strict=True):
        if our_ids != their_encoding.ids:
            raise UserError(f"{path} encodes {text!r} as {their_encoding.ids}, our tokenizer as {our_ids}")
    return tokenizer, core


def tokenizer_parts(content, vocab, path):
    """(ranks, pattern, special tokens) of our tokenizer. vocab: {token: id} with the special ones."""
    # Byte-level BPE whose pattern we can take over
    steps = content.get("pre_tokenizer") or {}
    match steps.get("pretokenizers"):
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ] if content.get("normalizer") is None and content["model"]["type"] == "BPE":
            pass
        case _:
            raise UserError(f"{path} is of another kind, needed: BPE of bytes, split by one pattern")

    # Ordinary tokens first, special ones last, no id left out
    added = {token["content"] for token in content["added_tokens"]}
    missing = [name for name in SPECIAL_TOKENS if name not in added]
    if missing:
        raise UserError(f"{path} lacks the special tokens {' '.join(missing)}")
    by_id = sorted(vocab, key=vocab.get)
    num_ordinary = len(by_id) - len(added)
    if sorted(vocab.values()) != list(range(len(by_id))) or set(by_id[num_ordinary:]) != added:
        raise UserError(f"{path} has other ids, needed: 0, 1, 2, ..., the special tokens last")

    # From the library's visible characters back to bytes
    to_byte = {character: byte for byte, character in byte_characters().items()}
    mergeable = [bytes(to_byte[character] for character in token) for token in by_id[:num_ordinary]]
    return mergeable, pattern, by_id[num_ordinary:]


# -----------------------------------------------------------------------------
# The chat template


def read_template(folder):
    """The folder's chat template as text, None if it has none."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def template_ids(template, core, messages, prompt):
    """The ids of a conversation by a template, or the error that it raised, as text."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    try:
        text = environment.from_string(hf_format.plain_template(template)).render(
            messages=messages,
            add_generation_prompt=prompt,
            bos_token="<|bos|>",
            raise_exception=raise_exception,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        return str(error)
    return core.encode(text, add_special_tokens=False).ids


def check_template(folder, core, tokenizer):
    """
    UserError if the folder's chat template writes an exchange differently than we do: the model
    would read what it was not trained on. Prints what else differs.
    """
    template = read_template(folder)
    if template is None:
        print(f"note: {folder} has no chat template, so whether we write conversations as it was trained is not known")
        return

    prompt = tokenizer.render_for_completion({"messages": EXCHANGE})
    found = template_ids(template, core, EXCHANGE, prompt=True)
    if found != prompt:
        theirs = core.decode(found, skip_special_tokens=False) if isinstance(found, list) else found
        raise UserError(
            f"the chat template of {folder} writes {theirs!r} where this project writes {tokenizer.decode(prompt)!r}",
            "--stage=base imports it without its chat format",
        )
    for name, messages in FURTHER.items():
        ids, _ = tokenizer.render_conversation({"messages": messages})
        if template_ids(template, core, messages, prompt=False) != ids:
            print(f"note: its chat template writes {name} in another way than this project does")


# -----------------------------------------------------------------------------
# The model


def read_tensors(folder):
    """{name: tensor} of the folder's safetensors files."""
    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"  # of weights in several files
    if index.exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
    tensors = {}
    for name in names:
        try:
            tensors |= load_file(folder / name)
        except (SafetensorError, FileNotFoundError) as error:
            raise UserError(f"{folder / name} cannot be read: {error}", "copy or download it again") from error
    return tensors


def build_model(config, tensors):
    """Our model from tensors by transformers' names, or by ours, as mlx-lm has them."""
    names = hf_format.tensor_names(config)
    if "transformer.wte.weight" in tensors:
        names = {name: name for name in names}
    wrong = tensors.keys() ^ set(names.values())
    if wrong:
        name = min(wrong)
        problem = "does not belong to this architecture" if name in tensors else "is missing"
        raise UserError(f"tensor {name} {problem}", "import weights that are whole and not quantized")

    try:
        with torch.device("meta"):
            ours = GPT(config)
    except ValueError as error:  # sizes that do not divide
        raise UserError(f"config.json does not fit: {error}") from error
    weights = {}
    for name, parameter in show_progress(ours.state_dict().items(), "converting", "tensors"):
        tensor = tensors[names[name]].float()
        if hf_format.has_token_rows(name):  # we pad them to a multiple of 64
            tensor = tensor[: config.vocab_size]
            tensor = F.pad(tensor, (0, 0, 0, len(parameter) - len(tensor)))
        if tensor.shape != parameter.shape:
            raise UserError(f"tensor {names[name]} has the shape {tuple(tensor.shape)}, "
                            f"by config.json it needs {tuple(parameter.shape)}")
        weights[name] = tensor.contiguous()
    ours.load_state_dict(weights, assign=True)
    return ours


def main():
    # Settings
    get_settings(globals())  # checks them
    folder, name = find_folder()
    tag = model_tag or re.sub(r"[^\w.+-]", "_", name.rpartition("/")[2])
    manager = CheckpointManager(get_checkpoint_dir(stage, tag))

    # Config, tokenizer, chat template
    content = read_json(folder / "config.json")
    config = hf_format.config_from_hf(content)
    tokenizer, core = read_tokenizer(folder)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise UserError(f"{folder} has {tokenizer.get_vocab_size()} tokens, but a model of {config.vocab_size}")
    config = replace(config, vocab_size=tokenizer.get_vocab_size())  # further rows are padding
    if content.get("rms_norm_eps", hf_format.NORM_EPS) != hf_format.NORM_EPS:
        print(f"note: its norms add {content['rms_norm_eps']}, ours {hf_format.NORM_EPS:.1e}: logits differ slightly")
    if stage != "base":
        check_template(folder, core, tokenizer)

    # Weights
    imported = build_model(config, read_tensors(folder))
    manager.claim(torch.device("cpu"))
    moved = manager.move_aside()
    if moved:
        print(f"note: the checkpoints of an earlier {tag} are now in {moved}")
    saved = manager.save(0, imported, tokenizer=tokenizer, meta={"imported_from": name})
    print(f"wrote {name}, {imported.num_params():,} parameters, as the {stage} model {tag} to {saved}")


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
