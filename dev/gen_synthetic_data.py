"""
Write the toy world to disk: a whole local data mirror (the layout of NANOCHAT_DATA_DIR) that a laptop's model learns.

    python -m dev.gen_synthetic_data --seed=42 --out=/tmp/toy_world        half a minute; no network, no model
    NANOCHAT_DATA_DIR=/tmp/toy_world python -m scripts.tok_train           and so on

The same seed gives the same bytes (with the same Python and pyarrow). Held-out parts are drawn first and everything
drawn later steps around them, so no test item is in training: not a word problem, not a question with the same
choices in any order, not an identity prompt, not a chat, not a document. The facts themselves are all in training; what
is held out is how they are asked. And the pretraining text spells no word that tasks/spellingbee.py tests.

A folder that is up to date stays as it is, and one that holds anything else is refused.

With an OpenAI-compatible server the same script asks a model for more varied identity conversations and adds the good
ones to the mirror's identity_conversations.jsonl, and to identity_added.jsonl, from which a later writing takes them:

    python -m dev.gen_synthetic_data --out=/tmp/toy_world --base_url=http://localhost:8000/v1 --model=NAME --num=200
"""

import hashlib
import json
import os
import random
import re
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import requests

from dev import toy_talk
from dev.toy_world import (
    FRIENDS,
    choice_item,
    fact_sheet,
    marked_item,
    marked_sheet,
    question_sheet,
    quiz_sheet,
    random_fact,
    story,
)
from nanochat.common import UserError, get_base_dir, run_script, write_text
from nanochat.configurator import override_from_cli
from tasks.common import read_jsonl
from tasks.spellingbee import is_test_word

seed: int = 42                # everything written is a function of it
out: str | None = None        # folder to write; None = <base_dir>/toy_world
base_url: str | None = None   # OpenAI-compatible server, e.g. http://localhost:8000/v1; None = no network at all
api_key: str | None = None    # sent as a bearer token; None = $OPENAI_API_KEY if that is set
model: str | None = None      # the model to ask for; needed with --base_url
num: int = 200                # identity conversations to add with --base_url

MANIFEST, IDENTITY_FILE, ADDED_FILE = "toy_world.json", "identity_conversations.jsonl", "identity_added.jsonl"
NUM_DOCS, NUM_VAL_DOCS, NUM_SHARDS = 39_000, 500, 3

# -----------------------------------------------------------------------------
# Drawing without overlap. An item has keys; two items that share a key are the same item


class Draws:
    """
    Draws items from the seed. An instance remembers the keys of the held-out ones, and makes `scale` times as many
    items as it is asked for (a test wants a small mirror).
    """

    def __init__(self, seed, scale=1.0):
        self.seed, self.scale, self.held = seed, scale, set()

    def rng(self, part):
        return random.Random(f"{self.seed}:{part}")

    def __call__(self, part, count, make, keys, hold_out=False):
        """
        `count` different items, each made by make(rng) from a generator of its own, none with a key that is held out.
        hold_out=True adds their own keys to the held-out ones, so that nothing drawn later shares one.
        """
        count = max(8, round(count * self.scale))
        items, seen = [], set()
        for attempt in range(count * 50):
            item = make(self.rng(f"{part}:{attempt}"))
            item_keys = tuple(keys(item))
            if item_keys in seen or not self.held.isdisjoint(item_keys):
                continue
            seen.add(item_keys)
            items.append(item)
            if len(items) == count:
                self.held.update(key for item_keys in seen for key in item_keys if hold_out)
                return items
        raise RuntimeError(f"{part}: only {len(items)} of {count} different items in {count * 50} draws")


def normalize(text):
    """What makes two texts the same: their letters and digits."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def choice_keys(item):
    """A multiple-choice item, marked or not, is its question with its choices in any order."""
    _, question, choices, *_ = item
    return [" / ".join([normalize(question), *sorted(map(normalize, choices))])]


def problem_keys(item):
    return [normalize(item[0])]


def identity_keys(messages):
    """No prompt of an identity conversation is a held-out one."""
    return [normalize(message["content"]) for message in messages if message["role"] == "user"]


def program_keys(row):
    return [normalize(row["prompt"])]


def chat_keys(messages):
    return [normalize(" ".join(message["content"] for message in messages))]


# What multiple choice asks about. In the challenge the fact is asked backwards, or only the choices tell the answer
SUBJECTS = {"mmlu": ["friends", "names", "colours", "kinds", "opposites"],
            "arc_easy": ["friends", "colours", "kinds", "opposites"], "arc_challenge": ["names", "members"]}
ALL_SUBJECTS = [*SUBJECTS["mmlu"], "members"]
MORE_FRIENDS = [*ALL_SUBJECTS, "friends", "names"]  # they have the most facts to learn
# What midtraining asks, in this order: (questions, their subjects, their ease), from choices of which only the right
# one can be meant to choices all of one kind
LESSONS = [(8_720, ALL_SUBJECTS, 1.0), *((676, MORE_FRIENDS, 1 - i / 13) for i in range(13)),
           (3_640, MORE_FRIENDS, 0.0)]

# -----------------------------------------------------------------------------
# The mirror, part by part: {path: rows}, the held-out parts first


def draw_tasks(draw):
    """Multiple choice in MMLU's and ARC's columns, word problems in GSM8K's, programs in HumanEval's: every split."""
    tables = {}
    for task, split, count in [
        ("mmlu", "test", 600), ("mmlu", "validation", 100), ("mmlu", "dev", 50), ("arc_easy", "test", 400),
        ("arc_easy", "validation", 100), ("arc_challenge", "test", 400), ("arc_challenge", "validation", 100),
        ("arc_easy", "train", 3_000), ("arc_challenge", "train", 1_000),
    ]:
        items = draw(f"{task}:{split}", count, lambda rng, task=task: choice_item(rng, SUBJECTS[task]), choice_keys,
                     hold_out="train" not in split)
        to_row = mmlu_row if task == "mmlu" else arc_row
        tables[f"tasks/{task}_{split}.parquet"] = [to_row(f"{task}-{split}-{i}", *item) for i, item in enumerate(items)]
    lessons = []
    for i, (count, *lesson) in enumerate(LESSONS):
        lessons += draw(f"mmlu:auxiliary_train:{i}", count, lambda rng, lesson=lesson: choice_item(rng, *lesson),
                        choice_keys)
    tables["tasks/mmlu_auxiliary_train.parquet"] = [mmlu_row("", *item) for item in lessons]
    for split, count in (("test", 400), ("train", 600)):
        items = draw(f"gsm8k:{split}", count, toy_talk.word_problem, problem_keys, hold_out=split == "test")
        tables[f"tasks/gsm8k_{split}.parquet"] = [{"question": q, "answer": a} for q, a in items]
    programs = draw("humaneval:test", 50, toy_talk.small_program, program_keys, hold_out=True)
    tables["tasks/humaneval_test.parquet"] = [{"task_id": f"Toy/{i}", **row} for i, row in enumerate(programs)]
    return tables


def mmlu_row(_, subject, question, choices, answer):
    return {"question": question, "subject": subject, "choices": choices, "answer": answer}


def arc_row(name, _, question, choices, answer):
    return {"id": name, "question": question, "choices": {"text": choices, "label": list("ABCD")},
            "answerKey": "ABCD"[answer]}


def identity_conversation(rng):
    """One to three questions about the model, perhaps after a greeting."""
    turns = [rng.choice(toy_talk.GREETINGS), "Hello! How can I help you?"] if rng.random() < 0.2 else []
    for _ in range(rng.choice([1, 1, 2, 3])):
        prompt, answer, _ = toy_talk.identity_question(rng)
        turns += [prompt, answer]
    return toy_talk.conversation(turns)


def held_out_questions(draw, n):
    """n identity prompts; an answer is right if it holds one of the phrases in `accept`, whatever the case."""
    questions = draw("identity:test", n, toy_talk.identity_question, problem_keys, hold_out=True)
    return [{"kind": "identity", "prompt": prompt, "answer": answer, "accept": accept}
            for prompt, answer, accept in questions]


def program_conversation(rng):
    row = toy_talk.small_program(rng)
    return {**row, "messages": toy_talk.conversation([row["prompt"], row["prompt"] + row["canonical_solution"]])}


def draw_conversations(draw):
    """(identity test rows, identity conversations, chats for test, chats for training)"""
    test = [{"messages": toy_talk.conversation([row["prompt"], row["answer"]]), "accept": row["accept"]}
            for row in held_out_questions(draw, 200)]
    identity = draw("identity:train", 1_500, identity_conversation, identity_keys)
    chat_test = draw("chat:test", 300, toy_talk.small_talk, chat_keys, hold_out=True)
    chats = draw("chat:train", 3_000, toy_talk.small_talk, chat_keys)
    programs = draw("chat:programs", 400, program_conversation, program_keys)
    chats += [row["messages"] for row in programs]
    draw.rng("chat:order").shuffle(chats)
    return test, identity, chat_test, chats


def draw_bundle(draw):
    """A small CORE bundle: facts, choices, story endings, and which of two friends a sentence is about."""
    rng, story_rows, schema_rows = draw.rng("core"), [], []
    facts = [random_fact(rng, ["friends", "opposites"]) for _ in range(200)]
    choices = draw("core:choices", 200, choice_item, choice_keys, hold_out=True)
    stories = draw("core:stories", 200, story, lambda text: [text], hold_out=True)
    endings = [text.rsplit(". ", 1) for text in stories]
    for beginning, ending in endings:
        options = [ending] + rng.sample([other for _, other in endings if other != ending], 3)
        rng.shuffle(options)
        story_rows.append({"query": beginning + ".", "choices": options, "gold": options.index(ending)})
    for _ in range(200):
        pair, gold = rng.sample(FRIENDS, 2), rng.randrange(2)
        schema_rows.append({"context_options": [f"{x} lives in" for x in pair],
                            "continuation": f"the {pair[gold].home}.", "gold": gold})
    return {  # label: (type, number of examples in the prompt, delimiter, random baseline in percent, rows)
        "toy_facts": ("language_modeling", 0, "\nAnswer: ", 0,
                      [{"context": f"Question: {fact.question}", "continuation": fact.sentence} for fact in facts]),
        "toy_choices": ("multiple_choice", 2, "\nAnswer: ", 25,
                        [{"query": f"Question: {q}", "choices": c, "gold": gold} for _, q, c, gold in choices]),
        "toy_stories": ("multiple_choice", 0, " ", 25, story_rows),
        "toy_homes": ("schema", 0, " ", 50, schema_rows),
    }


def draw_questions(draw):
    """(CORE bundle, tables of the tasks): the bundle first, since all of it is held out from the tasks' training."""
    bundle = draw_bundle(draw)
    return bundle, draw_tasks(draw)


def bundle_files(tasks):
    """{path: text} of the bundle in the layout of DCLM's CORE."""
    entries, baselines = ["icl_tasks:"], ["Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline"]
    files = {}
    for label, (kind, shots, delimiter, baseline, rows) in tasks.items():
        entries += [f"- label: {label}", f"  dataset_uri: toy/{label}.jsonl", f"  num_fewshot: [{shots}]",
                    f"  icl_task_type: {kind}", f"  continuation_delimiter: {json.dumps(delimiter)}"]
        baselines.append(f"{label},toy world,{kind.replace('_', ' ')},{shots},{len(rows)},{baseline}")
        files[f"eval_bundle/eval_data/toy/{label}.jsonl"] = to_jsonl(rows)
    return files | {"eval_bundle/core.yaml": "\n".join(entries) + "\n",
                    "eval_bundle/eval_meta_data.csv": "\n".join(baselines) + "\n"}


def draw_documents(draw, words):
    """(validation, training) documents for pretraining: stories, and the facts, sums and spelling around them."""
    spellable = [word for word in words if not is_test_word(word)]

    def text_doc(make):  # a document is (text, keys): the keys of the items it is made of, else the text itself
        def make_doc(rng):
            text = make(rng)
            return text, [text]
        return make_doc

    def item_doc(make, keys, count, render):
        def make_doc(rng):
            items = [make(rng) for _ in range(count)]
            return render(items), [key for item in items for key in keys(item)]
        return make_doc

    makers = {  # and their shares
        text_doc(lambda rng: toy_talk.echo_sheet(rng, words)): 29,
        text_doc(story): 25, text_doc(fact_sheet): 8, text_doc(question_sheet): 8,
        text_doc(lambda rng: toy_talk.list_sheet(rng, words)): 6,
        text_doc(lambda rng: toy_talk.spelling_sheet(rng, spellable)): 7,
        item_doc(lambda rng: choice_item(rng, SUBJECTS["mmlu"]), choice_keys, 3, quiz_sheet): 8,
        item_doc(lambda rng: marked_item(rng, ALL_SUBJECTS), choice_keys, 4, marked_sheet): 16,
        item_doc(toy_talk.word_problem, problem_keys, 4, toy_talk.worked_sheet): 6,
        item_doc(toy_talk.small_program, program_keys, 3, toy_talk.program_sheet): 1,
    }

    def document(rng):
        return rng.choices(list(makers), weights=makers.values())[0](rng)

    parts = [draw(f"pretrain:{split}", count, document, lambda doc: doc[1], hold_out=split == "val")
             for split, count in (("val", NUM_VAL_DOCS), ("train", NUM_DOCS))]
    return [[{"text": text} for text, _ in part] for part in parts]


# -----------------------------------------------------------------------------
# On disk


def write_atomically(path, write):
    """write(temporary path), then rename it into place: no half file is ever seen under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def to_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def generator_hash():
    """Of the code that decides what a seed gives."""
    folder = Path(__file__).parent
    sources = [folder / name for name in ("gen_synthetic_data.py", "toy_talk.py", "toy_world.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def is_up_to_date(root, seed):
    path = root / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return (manifest.get("generator"), manifest.get("seed")) == (generator_hash(), seed) and all(
        (root / name).is_file() for name in manifest["sha256"])


def claim(root):
    """
    Begin to write in `root`: its manifest becomes an unfinished one. A folder with files but without either is somebody
    else's. Returns (path of the unfinished manifest, names of the files that were written before).
    """
    manifest, unfinished = root / MANIFEST, root / f"{MANIFEST}.unfinished"
    if manifest.exists():
        os.replace(manifest, unfinished)
    elif not unfinished.exists():
        if root.exists() and any(not path.name.startswith(".") for path in root.iterdir()):
            raise UserError(f"--out={root} holds files, and no {MANIFEST}: it is no toy world", "choose a new folder")
        write_text(unfinished, "{}")
    return unfinished, set(json.loads(unfinished.read_text(encoding="utf-8")).get("sha256", {}))


def write_mirror(root, seed, scale=1.0):
    """The whole mirror under `root`. toy_world.json is written last: where it stands, all else is complete."""
    unfinished, old_names = claim(root)
    draw = Draws(seed, scale)
    words = toy_talk.make_words(draw.rng("words"))
    bundle, tables = draw_questions(draw)
    identity_test, identity, chat_test, chat_train = draw_conversations(draw)
    val, train = draw_documents(draw, words)
    shards = [train[i::NUM_SHARDS] for i in range(NUM_SHARDS)]
    tables |= {f"pretrain/shard_{i:05d}.parquet": shard for i, shard in enumerate([*shards, val])}  # the last validates
    tables |= {f"chat/{name}.parquet": [{"messages": chat} for chat in chats]
               for name, chats in (("train_00000", chat_train), ("test", chat_test))}
    texts = bundle_files(bundle) | {"tasks/identity_test.jsonl": to_jsonl(identity_test),
                                    IDENTITY_FILE: to_jsonl(identity),
                                    "words_alpha.txt": "".join(word + "\n" for word in words)}
    if (root / ADDED_FILE).exists():
        texts[IDENTITY_FILE] += (root / ADDED_FILE).read_text(encoding="utf-8")
    for name, rows in tables.items():
        table = pa.Table.from_pylist(rows)
        write_atomically(root / name, lambda path, table=table: pq.write_table(
            table, path, row_group_size=1000, compression="zstd"))
    for name, text in texts.items():
        write_text(root / name, text)
    hashes = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in sorted([*tables, *texts])}
    for name in old_names - set(hashes):
        (root / name).unlink(missing_ok=True)
    write_text(root / MANIFEST, json.dumps({"generator": generator_hash(), "seed": seed, "sha256": hashes}, indent=1))
    unfinished.unlink()
    return sum(table.nbytes for table in map(pq.read_table, map(root.joinpath, tables)))


# -----------------------------------------------------------------------------
# More identity conversations, from a server

BRIEF = """Write one short conversation between a user and nanochat. What is true of nanochat:
{facts}
The user is {user} and wants to know: {topic} Two to six messages in simple words, the user first, nanochat last.
Reply with JSON only: a list of {{"role": "user" or "assistant", "content": "..."}}."""
USERS = ["a child", "a teacher", "a curious student", "in a hurry", "very polite", "a bit rude", "a poet",
         "an engineer", "someone who has never met a chatbot", "tired", "joking", "a farmer"]
MAX_BAD = 20  # replies in a row that are no use, before giving up


def make_brief(rng):
    rows = list(toy_talk.IDENTITY.values())
    facts = "\n".join(f"- {rng.choice(answers)}" for _, _, answers, _ in rows)
    return BRIEF.format(facts=facts, user=rng.choice(USERS), topic=rng.choice(rng.choice(rows)[0]))


def ask_server(base_url, api_key, model, brief, timeout_s=120.0):
    """One chat completion, as text. ValueError: this reply is no use. UserError: no further one will be."""
    body = {"model": model, "messages": [{"role": "user", "content": brief}], "temperature": 1.0, "max_tokens": 800}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        url = f"{base_url.rstrip('/')}/chat/completions"
        response = requests.post(url, json=body, headers=headers, timeout=timeout_s)
    except requests.ConnectionError as error:
        raise UserError(f"--base_url={base_url} does not answer: {error}",
                        f"is the server up? try: curl {base_url}/models") from error
    except requests.RequestException as error:
        raise ValueError(f"no reply: {error}") from error
    if response.status_code in (400, 401, 403, 404):  # our address, key or model is wrong: asking again will not help
        raise UserError(f"--base_url={base_url} answers {response.status_code}: {response.text[:200]}",
                        "check --base_url (it ends in /v1), --api_key and --model")
    if response.status_code != 200:
        raise ValueError(f"status {response.status_code}")
    try:
        return response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"not a chat completion: {response.text[:80]!r}") from error


def parse_conversation(reply):
    """The messages in a reply, with or without a code fence around them; a ValueError says what is wrong with it."""
    found = re.search(r"\[.*\]", reply or "", re.DOTALL)
    messages = json.loads(found[0]) if found else None
    if not isinstance(messages, list) or not 2 <= len(messages) <= 8 or len(messages) % 2:
        raise ValueError("not a list of 2, 4, 6 or 8 messages")
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or message.get("role") != ("user", "assistant")[i % 2]:
            raise ValueError(f"message {i} is not the {('user', 'assistant')[i % 2]}'s text")
        if not 1 <= len(content.strip()) <= 600 or "<|" in content:
            raise ValueError(f"message {i} is empty, too long or holds a special token")
    if "nanochat" not in normalize(" ".join(message["content"] for message in messages[1::2])):
        raise ValueError("nanochat never says its name")
    return [{"role": message["role"], "content": message["content"].strip()} for message in messages]


def add_identity_conversations(root, num, ask, seed, wait_s=1.0):
    """Append `num` new conversations made by ask(brief) to the mirror; returns the number of bad replies by reason."""
    chats = [messages for _, messages in read_jsonl(root / IDENTITY_FILE)]
    held = {key for _, row in read_jsonl(root / "tasks/identity_test.jsonl") for key in identity_keys(row["messages"])}
    seen = {chat_keys(messages)[0] for messages in chats}
    rng, bad, added, streak = random.Random(f"{seed}:server:{len(chats)}"), Counter(), 0, 0
    while added < num:
        try:
            messages = parse_conversation(ask(make_brief(rng)))
            if chat_keys(messages)[0] in seen or not held.isdisjoint(identity_keys(messages)):
                raise ValueError("not new")
        except ValueError as error:  # a UserError too, but that one ends it
            if isinstance(error, UserError):
                raise
            bad[str(error)[:60]] += 1
            streak += 1
            if streak == MAX_BAD:
                raise UserError(f"{MAX_BAD} replies in a row were no use, {added} of {num} conversations added; "
                                f"the last: {error}", "try another --model") from error
            time.sleep(wait_s)
            continue
        seen.add(chat_keys(messages)[0])
        for path in (root / ADDED_FILE, root / IDENTITY_FILE):  # at once: a stop costs one conversation at most
            before = path.read_text(encoding="utf-8") if path.exists() else ""
            write_text(path, before + to_jsonl([messages]))
        added, streak = added + 1, 0
    return bad


def main():
    root = Path(out) if out else get_base_dir() / "toy_world"
    if base_url is not None and (not model or num < 1):
        raise UserError(f"--base_url needs --model and --num of at least 1; got --model={model} --num={num}",
                        "add for example --model=gpt-4o-mini --num=200")
    start = time.time()
    if base_url is None and is_up_to_date(root, seed):
        print(f"{root} is up to date | seed: {seed}")
    elif base_url is None or not (root / MANIFEST).exists():
        num_bytes = write_mirror(root, seed)
        print(f"wrote {root} | seed: {seed} | text: {num_bytes / 1e6:.1f} MB | time: {time.time() - start:.1f} s")
        print(f"use it: export NANOCHAT_DATA_DIR={root}")
    if base_url is not None:
        key = api_key or os.environ.get("OPENAI_API_KEY")
        bad = add_identity_conversations(root, num, lambda brief: ask_server(base_url, key, model, brief), seed)
        print(f"added {num} conversations to {root / IDENTITY_FILE} | bad replies: {sum(bad.values())} {dict(bad)}")


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
