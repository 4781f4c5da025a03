"""
Write the toy world to disk: a whole local data mirror (the layout of NANOCHAT_DATA_DIR) that a laptop's model learns.

    python -m dev.gen_synthetic_data --seed=42 --out=/tmp/toy_world        less than a minute; no network, no model
    NANOCHAT_DATA_DIR=/tmp/toy_world python -m scripts.tok_train           and so on

What the world is, and how to add to it, stands in dev/toyworld/README.md. The same seed gives the same bytes (with the
same Python and pyarrow). A folder that is up to date stays as it is, and one that holds anything else is refused.

For a real run only the conversations that say who the model is are of use. They are of the persona "run" in
dev/toyworld/persona.json, whose size follows from the depth, and know nothing of the village:

    python -m dev.gen_synthetic_data --identity_only --depth=20 --out=identity_conversations.jsonl

With an OpenAI-compatible server the script asks a model for more varied identity conversations and adds the good ones
to the mirror's identity_conversations.jsonl, and to identity_added.jsonl, from which a later writing takes them:

    python -m dev.gen_synthetic_data --out=/tmp/toy_world --base_url=http://localhost:8000/v1 --model=NAME --num=200
"""

import hashlib
import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dev.toyworld.chat import conversation
from dev.toyworld.draws import Draws
from dev.toyworld.mirror import IDENTITY_FILE, chat_keys, draw_mirror, to_jsonl
from dev.toyworld.persona import count_parameters, identity_conversation, load_persona, say_count, self_intents
from dev.toyworld.server import ADDED_FILE, add_identity_conversations, ask_server
from nanochat.common import UserError, get_base_dir, run_script, write_text
from nanochat.configurator import override_from_cli

seed: int = 42                # everything written is a function of it
out: str | None = None        # folder to write; None = <base_dir>/toy_world. With --identity_only a file
# The model of a real run
identity_only: bool = False   # write only identity conversations, of the persona "run"
depth: int = 20               # layers of that model, from which its size follows
vocab_size: int = 65536       # of its tokenizer
data: str = "a very large collection of web pages and conversations"  # what it was trained on, in words
num_conversations: int = 1500  # to write with --identity_only
# More identity conversations, from a server
base_url: str | None = None   # OpenAI-compatible server, e.g. http://localhost:8000/v1; None = no network at all
api_key: str | None = None    # sent as a bearer token; None = $OPENAI_API_KEY if that is set
model: str | None = None      # the model to ask for; needed with --base_url
num: int = 200                # identity conversations to add with --base_url

MANIFEST = "toy_world.json"

# -----------------------------------------------------------------------------
# On disk


def write_table(path, rows):
    """A parquet file, written under another name first: no half file is ever seen under its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(pa.Table.from_pylist(rows), temporary, row_group_size=1000, compression="zstd")
    os.replace(temporary, path)


def generator_hash():
    """Of the code and the data that decide what a seed gives."""
    folder = Path(__file__).parent
    sources = [Path(__file__), *folder.glob("toyworld/*.py"), *folder.glob("toyworld/*.json"),
               *folder.glob("toyworld/data/*.txt")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()


def is_up_to_date(root, seed):
    path = root / MANIFEST
    if not path.exists():
        return False
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("generator") != generator_hash() or manifest.get("seed") != seed:
        return False
    return all((root / name).is_file() for name in manifest["sha256"])


def claim(root):
    """
    Begin to write in `root`: its manifest becomes an unfinished one. A folder with files but without either is somebody
    else's. Returns (path of the unfinished manifest, names of the files that were written before).
    """
    manifest = root / MANIFEST
    unfinished = root / f"{MANIFEST}.unfinished"
    if manifest.exists():
        os.replace(manifest, unfinished)
    elif not unfinished.exists():
        found = root.iterdir() if root.exists() else []
        if any(not path.name.startswith(".") for path in found):
            raise UserError(f"--out={root} holds files, and no {MANIFEST}: it is no toy world", "choose a new folder")
        write_text(unfinished, "{}")
    return unfinished, set(json.loads(unfinished.read_text(encoding="utf-8")).get("sha256", {}))


def write_mirror(root, seed, scale=1.0):
    """The whole mirror under `root`. toy_world.json is written last: where it stands, all else is complete."""
    unfinished, old_names = claim(root)
    tables, texts = draw_mirror(Draws(seed, scale))
    if (root / ADDED_FILE).exists():
        texts[IDENTITY_FILE] += (root / ADDED_FILE).read_text(encoding="utf-8")
    for name, rows in tables.items():
        write_table(root / name, rows)
    for name, text in texts.items():
        write_text(root / name, text)

    hashes = {}
    for name in sorted([*tables, *texts]):
        hashes[name] = hashlib.sha256((root / name).read_bytes()).hexdigest()
    for name in old_names - set(hashes):
        (root / name).unlink(missing_ok=True)
    manifest = {"generator": generator_hash(), "seed": seed, "sha256": hashes}
    write_text(root / MANIFEST, json.dumps(manifest, indent=1))
    unfinished.unlink()
    return sum(pq.read_table(root / name).nbytes for name in tables)


def write_run_identity(path, seed, depth, vocab_size, data, count):
    """Identity conversations of a real run's model, one a line; returns its number of parameters."""
    params = count_parameters(depth, vocab_size)
    persona = load_persona("run", depth=depth, params=say_count(params), data=data)
    intents = self_intents()

    def make(rng):
        turns = identity_conversation(rng, persona, intents)
        return conversation(turns)

    chats = Draws(seed)("run identity", count, make, chat_keys)
    write_text(path, to_jsonl(chats))
    return params


# -----------------------------------------------------------------------------


def main():
    if base_url is not None and (not model or num < 1):
        raise UserError(f"--base_url needs --model and --num of at least 1; got --model={model} --num={num}",
                        "add for example --model=gpt-4o-mini --num=200")
    if identity_only:
        path = Path(out) if out else get_base_dir() / IDENTITY_FILE
        params = write_run_identity(path, seed, depth, vocab_size, data, num_conversations)
        print(f"wrote {path} | conversations: {num_conversations} | of a model with {say_count(params)} parameters")
        return

    root = Path(out) if out else get_base_dir() / "toy_world"
    start = time.time()
    if base_url is None and is_up_to_date(root, seed):
        print(f"{root} is up to date | seed: {seed}")
    elif base_url is None or not (root / MANIFEST).exists():
        num_bytes = write_mirror(root, seed)
        print(f"wrote {root} | seed: {seed} | text: {num_bytes / 1e6:.1f} MB | time: {time.time() - start:.1f} s")
        print(f"use it: export NANOCHAT_DATA_DIR={root}")
    if base_url is not None:
        key = api_key or os.environ.get("OPENAI_API_KEY")

        def ask(brief):
            return ask_server(base_url, key, model, brief)

        bad = add_identity_conversations(root, num, ask, seed)
        print(f"added {num} conversations to {root / IDENTITY_FILE} | bad replies: {sum(bad.values())} {dict(bad)}")


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
