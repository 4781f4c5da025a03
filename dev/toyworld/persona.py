"""
Who the model is: the fields of persona.json, and the conversations that teach them.

`load_persona("toy")` is the laptop's model, which knows the village. `load_persona("run", depth=20, ...)` is the model
of a real run: its size follows from the depth, and no conversation of its mentions the village.
"""

import json
from pathlib import Path

from dev.toyworld.grammar import capitalize, expand, read_intents
from dev.toyworld.typed import typed, typed_one
from nanochat.common import UserError

PERSONA_FILE = Path(__file__).parent / "persona.json"
OFFERS = "Hello! [How can I help you|What can I do for you]?"


def count_parameters(depth, vocab_size):
    """As nanochat/gpt.py has them: width 64 * depth, 12 width^2 a layer, an embedding and a head."""
    width = 64 * depth
    return 12 * depth * width**2 + 2 * vocab_size * width


def say_count(number):
    """560988160 -> '561 million'"""
    if number >= 995_000_000:
        return f"{number / 1e9:.1f} billion"
    return f"{round(number / 1e6)} million"


def load_persona(name="toy", path=PERSONA_FILE, **facts):
    """The persona `name` with its placeholders filled from `facts`, and each field also with a capital."""
    text = Path(path).read_text(encoding="utf-8")
    personas = json.loads(text)
    if name not in personas:
        raise UserError(f"{path} has no persona {name!r}", f"it has {', '.join(personas)}")
    persona = personas[name]
    try:
        persona = {field: text.format(**facts) for field, text in persona.items()}
    except KeyError as error:
        raise UserError(f"{path}: persona {name!r} has the placeholder {error}, which is not known",
                        f"known are {', '.join(facts) or 'none'}") from error
    capitals = {field.capitalize(): capitalize(text) for field, text in persona.items()}
    return persona | capitals


def self_intents():
    """The intents about the model itself."""
    return read_intents("talk_self.txt")[1]



def identity_exchange(rng, persona, intents, frame=1.0):
    """(question, answer, phrases one of which a right answer has)"""
    weights = [intent["weight"] for intent in intents]
    intent = rng.choices(intents, weights)[0]
    question = typed_one(intent[">"], rng, frame, name=persona["name"])
    template = rng.choice(intent["<"])
    answer = expand(template, rng).format(**persona)
    accept = [phrase.format(**persona) for phrase in intent["!"]]
    return question, answer, accept


def identity_conversation(rng, persona, intents):
    """One to four questions about the model, often after a greeting and before a goodbye."""
    name = persona["name"]
    turns = []
    if rng.random() < 0.25:
        greeting = typed("[hi|hello|hey|good morning|hi there|hello there]", rng, name=name)
        turns.append((greeting, expand(OFFERS, rng)))
    for _ in range(rng.choice([1, 1, 2, 3, 4])):
        question, answer, _ = identity_exchange(rng, persona, intents)
        turns.append((question, answer))
    if rng.random() < 0.15:
        thanks = typed("[thanks|thank you|thank you very much]", rng, name=name)
        turns.append((thanks, "You are welcome!"))
    return turns
