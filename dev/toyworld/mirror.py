"""
The whole mirror as tables and texts: what is held out is drawn first, and everything drawn later steps around it.

No test item is in training: not a word problem, not a question with the same choices in any order, not an identity
prompt, not a conversation, not a document. Word problems and conversations of the test splits have names, things and
words that training never uses in their place. The facts themselves are all in training.
"""

import json

from dev.toyworld import choices
from dev.toyworld.calculate import to_gsm8k
from dev.toyworld.chat import PERSONA, conversation, draw_conversation
from dev.toyworld.draws import choice_keys, normalize, user_keys
from dev.toyworld.grammar import DATA
from dev.toyworld.persona import identity_conversation, identity_exchange, self_intents
from dev.toyworld.problems import draw_problem
from dev.toyworld.spelling import WORDS
from dev.toyworld.stories import story
from dev.toyworld.strangers import dialogue_lines, drop_near_copies, question
from dev.toyworld.sums import one_sum
from dev.toyworld.text import draw_document
from dev.toyworld.village import FRIENDS
from tasks.near_copies import user_texts

IDENTITY_FILE = "identity_conversations.jsonl"
NUM_SHARDS = 3

# How many of each: the one table of sizes
SIZES = {
    "documents": 36_000,
    "validation documents": 500,
    "chats": 60_000,
    "test chats": 400,
    "identity conversations": 1_500,
    "identity questions": 200,
    "problems": 2_400,
    "test problems": 400,
    "programs": 50,
    "bundle": 200,
    "mmlu test": 600,
    "mmlu validation": 100,
    "mmlu dev": 50,
    "mmlu auxiliary_train": 1_000,
    "arc_easy test": 400,
    "arc_easy validation": 100,
    "arc_easy train": 500,
    "arc_challenge test": 400,
    "arc_challenge validation": 100,
    "arc_challenge train": 200,
}
PROMPT_OPENINGS = ("One question: ", "I am new here. ", "Excuse me. ", "I have a question. ", "Please answer this: ",
                   "Let me ask you something. ", "I am curious. ", "Just one thing: ")


def to_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def chat_keys(messages):
    """The conversation as a whole, and each message of the user, for prompts are held out, too."""
    return [json.dumps(messages), *user_keys(messages)]


# -----------------------------------------------------------------------------
# Tasks


def draw_choices(draw):
    """Multiple choice in MMLU's and ARC's columns, the held-out splits first."""
    tables = {}
    names = [name for name in SIZES if name.startswith(("mmlu", "arc"))]
    for name in sorted(names, key=lambda name: name.endswith("train")):
        task, split = name.split()

        def make(rng, subjects=choices.SUBJECTS[task]):
            return choices.choice_item(rng, subjects)

        hold = None if split.endswith("train") else held_choice
        items = draw(name, SIZES[name], make, held_choice, hold=hold)
        rows = []
        for i, item in enumerate(items):
            row = choices.mmlu_row(item) if task == "mmlu" else choices.arc_row(f"{task}-{split}-{i}", item)
            rows.append(row)
        tables[f"tasks/{task}_{split}.parquet"] = rows
    return tables


def any_choice(rng):
    return choices.choice_item(rng, choices.ALL_SUBJECTS)


def held_choice(item):
    return [choice_keys(item)]


def draw_gsm8k(rng):
    """A row of GSM8K: three word problems in four, else a sum. For training, some are typed in a hurry."""
    if rng.random() < 0.75:
        plain = rng.split == "test" or rng.random() < 0.5
        return draw_problem(rng, plain).row()
    question, answer = one_sum(rng)
    return {"question": question, "answer": to_gsm8k(answer)}


def question_key(row):
    return [normalize(row["question"])]


def small_program(rng):
    """A function of one line in HumanEval's columns, for evaluation only: x plus 7, or x plus 7 and that times 3."""
    signs = {"plus": "+", "minus": "-", "times": "*"}
    steps = [(rng.choice(list(signs)), rng.randint(2, 20)) for _ in range(rng.choice([1, 2, 2]))]
    name = "_".join(f"{word}_{n}" for word, n in steps)
    says = ", and that ".join(f"{word} {n}" for word, n in steps)
    expression = "x"
    for word, n in steps:
        expression = f"({expression}) {signs[word]} {n}" if expression != "x" else f"x {signs[word]} {n}"
    checks = "".join(f"    assert candidate({x}) == {expression.replace('x', str(x))}\n" for x in (0, 3, 10))
    return {
        "prompt": f'def {name}(x):\n    """Return x {says}."""\n',
        "canonical_solution": f"    return {expression}\n",
        "test": f"def check(candidate):\n{checks}",
        "entry_point": name,
    }


def draw_tasks(draw):
    """{path: rows} of all tasks."""
    tables = draw_choices(draw)
    for split, name in (("test", "test problems"), ("train", "problems")):
        hold = question_key if split == "test" else None
        rows = draw(f"gsm8k {split}", SIZES[name], draw_gsm8k, question_key, split=split, hold=hold)
        rows = drop_near_copies(rows, question)
        tables[f"tasks/gsm8k_{split}.parquet"] = rows
    programs = draw("humaneval", SIZES["programs"], small_program, lambda row: [row["prompt"]])
    rows = [{"task_id": f"Toy/{i}", **row} for i, row in enumerate(programs)]
    tables["tasks/humaneval_test.parquet"] = rows
    return tables


# -----------------------------------------------------------------------------
# Conversations


def draw_conversations(draw):
    """(identity questions, identity conversations, test chats, chats)"""
    intents = self_intents()

    def make_question(rng):
        question, answer, accept = identity_exchange(rng, PERSONA, intents, frame=0.3)
        prompt = rng.choice(PROMPT_OPENINGS) + question  # so that no plain question is missing in training
        return {"messages": conversation([(prompt, answer)]), "accept": accept}

    def make_identity(rng):
        return conversation(identity_conversation(rng, PERSONA, intents))

    def prompt_keys(row):
        return user_keys(row["messages"])

    questions = draw("identity test", SIZES["identity questions"], make_question, prompt_keys, hold=prompt_keys)
    identity = draw("identity", SIZES["identity conversations"], make_identity, chat_keys)
    test = draw("chat test", SIZES["test chats"], draw_conversation, chat_keys, split="test",
                hold=lambda messages: chat_keys(messages)[:1])
    chats = draw("chat", SIZES["chats"], draw_conversation, chat_keys)
    identity = drop_near_copies(identity, user_texts)
    chats = drop_near_copies(chats, user_texts)
    return questions, identity, test, chats


def parts_only(messages):
    """The messages as one Arrow column can hold them: every content a list of parts."""
    rows = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        rows.append({"role": message["role"], "content": parts})
    return rows


# -----------------------------------------------------------------------------
# The CORE bundle and the documents


def draw_bundle(draw):
    """
    A small CORE bundle: facts, choices, story endings, and which of two friends a sentence is about.
    {label: (type, examples in the prompt, delimiter, random baseline in percent, rows)}
    """
    rng = draw.rng("core")
    facts = [choices.random_fact(rng, ["friends", "opposites"]) for _ in range(SIZES["bundle"])]
    fact_rows = [{"context": f"Question: {fact.question}", "continuation": fact.sentence} for fact in facts]
    items = draw("core choices", SIZES["bundle"], any_choice, held_choice, hold=held_choice)
    choice_rows = [{"query": f"Question: {question}", "choices": options, "gold": gold}
                   for _, question, options, gold in items]
    tales = draw("core stories", SIZES["bundle"], story, lambda text: [text], hold=lambda text: [text])
    endings = [text.rsplit(". ", 1) for text in tales if ". " in text]
    story_rows = []
    for beginning, ending in endings:
        others = [other for _, other in endings if other != ending]
        options = rng.sample([ending, *rng.sample(others, 3)], 4)
        story_rows.append({"query": f"{beginning}.", "choices": options, "gold": options.index(ending)})
    home_rows = []
    for _ in range(SIZES["bundle"]):
        pair = rng.sample(FRIENDS, 2)
        gold = rng.randrange(2)
        home_rows.append({
            "context_options": [f"{x} lives in" for x in pair],
            "continuation": f"the {pair[gold].home}.",
            "gold": gold,
        })
    return {
        "toy_facts": ("language_modeling", 0, "\nAnswer: ", 0, fact_rows),
        "toy_choices": ("multiple_choice", 2, "\nAnswer: ", 25, choice_rows),
        "toy_stories": ("multiple_choice", 0, " ", 25, story_rows),
        "toy_homes": ("schema", 0, " ", 50, home_rows),
    }


def bundle_files(tasks):
    """{path: text} of the bundle in the layout of DCLM's CORE."""
    entries = ["icl_tasks:"]
    baselines = ["Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline"]
    files = {}
    for label, (kind, shots, delimiter, baseline, rows) in tasks.items():
        entries += [
            f"- label: {label}",
            f"  dataset_uri: toy/{label}.jsonl",
            f"  num_fewshot: [{shots}]",
            f"  icl_task_type: {kind}",
            f"  continuation_delimiter: {json.dumps(delimiter)}",
        ]
        words = kind.replace("_", " ")
        baselines.append(f"{label},toy world,{words},{shots},{len(rows)},{baseline}")
        files[f"eval_bundle/eval_data/toy/{label}.jsonl"] = to_jsonl(rows)
    files["eval_bundle/core.yaml"] = "\n".join(entries) + "\n"
    files["eval_bundle/eval_meta_data.csv"] = "\n".join(baselines) + "\n"
    return files


def draw_documents(draw):
    """{path: rows} of the pretraining shards; the last one validates."""
    def document_keys(document):
        text, keys = document
        return [text, *keys]

    def text_only(document):
        return [document[0]]

    held = draw("validation", SIZES["validation documents"], draw_document, document_keys, hold=text_only)
    documents = draw("documents", SIZES["documents"], draw_document, document_keys)
    documents = drop_near_copies(documents, dialogue_lines)
    shards = [documents[i::NUM_SHARDS] for i in range(NUM_SHARDS)]
    tables = {}
    for i, shard in enumerate([*shards, held]):
        tables[f"pretrain/shard_{i:05d}.parquet"] = [{"text": text} for text, _ in shard]
    return tables


def draw_mirror(draw):
    """({path: rows of a table}, {path: text})"""
    bundle = draw_bundle(draw)  # first, since all of it is held out from the tasks' training
    tables = draw_tasks(draw)
    questions, identity, test, chats = draw_conversations(draw)
    tables |= draw_documents(draw)
    tables["chat/train_00000.parquet"] = [{"messages": parts_only(messages)} for messages in chats]
    tables["chat/test.parquet"] = [{"messages": parts_only(messages)} for messages in test]
    texts = bundle_files(bundle)
    texts["tasks/identity_test.jsonl"] = to_jsonl(questions)
    texts[IDENTITY_FILE] = to_jsonl(identity)
    texts["examples.txt"] = (DATA / "examples.txt").read_text(encoding="utf-8")
    texts["words_alpha.txt"] = "".join(f"{word}\n" for word in WORDS)
    return tables, texts
