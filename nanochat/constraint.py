"""
Constrained decoding: answers that are JSON, that follow a JSON schema, or that call a client's
function, whatever the model has learned. Before each token, those that cannot go on are banned.

The grammars and masks are llguidance's, an optional package that is imported only when a request
asks for it. Its `no_forcing` allows every tokenization of an answer, not only the tokenizer's own.

A call of a function is written as {"name": NAME, "arguments": ARGUMENTS}, as conversation.py
writes the calls of a conversation.
"""

import functools
import json

import numpy as np
import torch

from nanochat.common import UserError

# The white space of Python's json.dumps, and no other: a model could go on with spaces for ever
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# -----------------------------------------------------------------------------
# Grammars, in llguidance's dialect of Lark

# With these beside them, `properties` may not be all that an object has
COMBINING = {"allOf", "anyOf", "oneOf", "$ref", "patternProperties", "dependentSchemas", "if"}


def json_rule(schema):
    """
    The right side of a rule: JSON values that follow a schema, a dict. An object gets no properties
    that the schema does not name, unless it says that there are some: a model could go on with them.
    """
    if "properties" in schema and not COMBINING & schema.keys():
        schema = {"additionalProperties": False, **schema}
    return "%json " + json.dumps({**schema, "x-guidance": JSON_STYLE})


def call_start(name):
    """The beginning of a call, before its arguments."""
    return f'{{"name": "{name}", "arguments": '


def make_grammar(schema=None, functions=None):
    """
    A grammar for JSON that follows `schema`, or a call of one of the functions, {name: schema of
    its arguments}; either may be None.
    """
    rules = []
    for i, (name, parameters) in enumerate((functions or {}).items()):
        # each schema is a rule of its own, since its references start at its root
        start = json.dumps(call_start(name))
        rules.append((f"call_{i}", f'{start} arguments_{i} "}}"'))
        rules.append((f"arguments_{i}", json_rule(parameters)))
    choices = [name for name, _ in rules if name.startswith("call_")]
    if schema is not None:
        rules.append(("answer", json_rule(schema)))
        choices.append("answer")

    lines = ['%llguidance {"no_forcing": true}', f"start: {' | '.join(choices)}"]
    lines += [f"{name}: {rule}" for name, rule in rules]
    return "\n".join(lines)


def describe_functions(functions):
    """The text that tells a model which functions it may call. functions: a list of dicts."""
    lines = [json.dumps(function, ensure_ascii=False) for function in functions]
    return "\n".join([
        "You can call these functions:",
        *lines,
        'To call one, answer with {"name": NAME, "arguments": ARGUMENTS} and nothing else.',
    ])


# -----------------------------------------------------------------------------
# The constraint of one row


class Constraint:
    """
    What one row may write next: `banned` before each token, `feed` after it. It must end with
    `stop_token`, which is allowed once the answer is complete.

    others: None, or the tokens (V,) with which the row may begin instead. It is free after one of
    them. functions: names that a call may have.
    """

    def __init__(self, matcher, stop_token, others=None, functions=()):
        self.matcher = matcher
        self.stop_token = stop_token
        self.others = others
        self.functions = functions
        self.active = True  # False: the row is free

    def banned(self):
        """The tokens that may not come next, a bool array (V,); None if all may."""
        if not self.active:
            return None
        # a byte for each token, not 0 if it is allowed. After an error only the stop token is
        allowed = np.frombuffer(self.matcher.compute_logit_bias(), np.uint8)
        banned = allowed == 0
        if self.others is not None:
            banned &= ~self.others
        return banned

    def ban(self, logits):
        """Ban these tokens in a row's logits (V,), in place."""
        banned = self.banned()
        if banned is None:
            return
        if logits.device.type == "cpu":  # a third of the time that torch takes
            np.copyto(logits.numpy(), -np.inf, where=banned)
        else:
            logits.masked_fill_(torch.from_numpy(banned).to(logits.device), -torch.inf)

    def feed(self, token):
        """Take the row's next token."""
        if not self.active:
            return
        if self.others is not None and self.others[token]:
            self.active = False
            return
        self.others = None
        if token != self.stop_token:
            self.matcher.consume_token(token)

    @property
    def complete(self):
        """Whether the answer may end here."""
        return not self.active or self.matcher.is_accepting()

    def read_call(self, text):
        """(name, arguments as JSON) of an answer that is a call, else None."""
        for name in self.functions:
            start = call_start(name)
            if text.startswith(start) and text.endswith("}"):
                return name, text[len(start) : -1]
        return None


class Constraints:
    """Makes the constraints of a tokenizer. ImportError without llguidance."""

    def __init__(self, tokenizer, stop_token):
        import llguidance  # optional

        self.llguidance = llguidance
        self.stop_token = stop_token
        special = tokenizer.get_special_tokens()

        # what the library needs to know of a tokenizer. It encodes no text, since nothing is forced
        def encode(text):
            return tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))

        encode.eos_token_id = stop_token
        encode.bos_token_id = tokenizer.get_bos_token_id()
        encode.tokens = [*tokenizer.mergeable, *(name.encode() for name in special)]
        encode.special_token_ids = [tokenizer.encode_special(name) for name in special]
        wrapper = llguidance.TokenizerWrapper(encode)
        self.guidance_tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=len(encode.tokens))

        # an answer that may be a call is one if it begins with a brace
        is_other = [not token.startswith(b"{") for token in encode.tokens]
        self.not_brace = np.array(is_other)

    def make(self, schema=None, functions=None, optional=False):
        """
        A function that returns a new Constraint each time: an answer that follows `schema`, or
        calls one of the functions, as for make_grammar. optional: or is free text that does not
        begin with a brace. ValueError if a schema cannot be followed.
        """
        grammar = make_grammar(schema, functions)
        matcher = self.llguidance.LLMatcher(self.guidance_tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().strip().splitlines()[0]
            raise ValueError(f"this JSON schema cannot be followed: {reason}")
        others = self.not_brace if optional else None
        names = tuple(functions or ())
        return lambda: Constraint(matcher.deep_copy(), self.stop_token, others, names)


@functools.lru_cache(maxsize=8)
def get_constraints(tokenizer):
    """The Constraints of a tokenizer, which take up to a second to make. UserError without llguidance."""
    try:
        return Constraints(tokenizer, tokenizer.encode_special("<|assistant_end|>"))
    except ImportError as error:
        raise UserError(
            "response_format and tools need the package llguidance on the server",
            "pip install llguidance",
        ) from error
