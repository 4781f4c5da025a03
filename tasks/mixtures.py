"""
The mixtures of conversations that midtraining and supervised finetuning train on.
"""

from nanochat.common import get_data_root, print0
from tasks.arc import ARC
from tasks.common import TaskMixture
from tasks.customjson import IDENTITY, CustomJSON
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee


def identity_tasks(epochs):
    """The identity conversations `epochs` times; none, with a note, where there is no such file."""
    folder = get_data_root()
    if not (folder / IDENTITY).is_file():
        command = f"python -m dev.gen_synthetic_data --identity_only --out={folder / IDENTITY}"
        print0(
            f"note: no {IDENTITY} in {folder}: the model does not learn who it is "
            f"({command} --depth=20 writes one for a d20)"
        )
        return []
    return [CustomJSON() for _ in range(epochs)]


def own_conversations(data):
    """The user's --data, a file of conversations, as a list of one task; empty without it."""
    return [CustomJSON(data)] if data is not None else []


def mid_mixture(identity_epochs, spelling_size, spellingbee_size, data=None):
    """
    Small talk, multiple choice, word problems with the calculator, identity, spelling, and the
    conversations of the user's own file `data`. All examples, shuffled.
    """
    tasks = [
        SmolTalk("train"),
        MMLU("auxiliary_train"),
        GSM8K(split="train"),
        *identity_tasks(identity_epochs),
        SimpleSpelling(spelling_size, "train"),
        SpellingBee(spellingbee_size, "train"),
        *own_conversations(data),
    ]
    return TaskMixture(tasks)


def sft_mixture(smoltalk_size, identity_epochs, spelling_size, spellingbee_size, data=None):
    """
    Conversations of the quality the model should have: fewer of each kind than in midtraining, the
    tasks in full.
    """
    tasks = [
        ARC("ARC-Easy", "train"),
        ARC("ARC-Challenge", "train"),
        GSM8K(split="train"),
        SmolTalk("train", stop=smoltalk_size),
        *identity_tasks(identity_epochs),
        SimpleSpelling(spelling_size, "train"),
        SpellingBee(spellingbee_size, "train"),
        *own_conversations(data),
    ]
    return TaskMixture(tasks)
