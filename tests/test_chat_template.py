"""The exported chat templates: in every engine the ids that our renderers give, and for trainers the same mask."""

import json
import os
import re
import shutil
import subprocess

import pytest

from nanochat import hf_format
from nanochat.common import UserError
from tests import exports

TEMPLATE = hf_format.chat_template()
PLAIN = hf_format.plain_template(TEMPLATE)


@pytest.fixture(scope="module")
def folder(small_base):
    return exports.export(small_base, small_base / "templates", model_tag="kv2")


@pytest.fixture(scope="module")
def theirs(transformers, folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


# -----------------------------------------------------------------------------
# Conversations


def user(content):
    return {"role": "user", "content": content}


def system(content):
    return {"role": "system", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def tool(content):
    return {"role": "tool", "content": content, "tool_call_id": "call_1"}


def calls(*arguments):
    """tool_calls as OpenAI's clients send them."""
    return [{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": text}} for text in arguments]


def part(text, kind="text"):
    return {"type": kind, "text": text}


SYSTEM = system(" Be kind.\n")
CALL = assistant([part("12*3 = "), part("12*3", "python"), part("36", "python_output"), part("36\n")])
CONVERSATIONS = {
    "a question": [user("Who are you?")],
    "white space is kept": [user("\n  {{ 'x' }} <b> &amp; \t\n")],
    "empty": [user("")],
    "a system message": [SYSTEM, user("Hi")],
    "a system message and turns": [SYSTEM, user("Hi"), assistant("Hello."), user("12*3?"), CALL, user("Σ, 東京?")],
    "ends with the assistant": [user("12*3?"), CALL],
    "system, ends with the assistant": [SYSTEM, user("a"), assistant("b")],
    "parts": [{"role": "system", "content": [part("Be"), part(" kind.")]}, user([part("He"), part("llo")])],
    "two system messages": [system("s"), system("t"), user("a")],
    "system and developer": [system("s"), {"role": "developer", "content": "d"}, user("a")],
    "a later system message": [user("a"), assistant("b"), system("s"), user("c")],
    "a system message alone": [system("s")],
    "user after user": [user("a"), user("b"), assistant("c")],
    "assistant after assistant": [user("a"), assistant("b"), assistant("c")],
    "assistant first": [assistant("a"), user("b"), assistant("c")],
    "assistant alone": [assistant("a")],
    "system, assistant first": [system("s"), assistant("a"), user("b")],
    "null": [user("a"), assistant(None), user("b")],
    "null at the end": [user("a"), assistant(None)],
    "empty texts": [system(""), user("a"), user(""), assistant("")],
    "empty parts": [user([part("")]), user("a"), assistant([part(""), part("", "python"), part("")])],
    "assistant's parts": [user("a"), assistant([part("c"), part("d")])],
    "a tool's result": [user("a"), assistant(None, tool_calls=calls('{"a": 1}')), tool("3"), assistant("It is 3.")],
    "calls after a text": [
        user("a"), assistant("Wait.", tool_calls=calls('{"a": 1}', '{"b":2}')), tool("3"), tool("4")],
    "arguments as an object": [user("a"), assistant("", tool_calls=calls({"a": 1}))],
    "the older form of a call": [
        user("a"), assistant(None, function_call={"name": "add", "arguments": '{"a": 1}'}),
        {"role": "function", "name": "add", "content": "3"}],
    "a result without a call": [user("a"), assistant("b"), tool("3"), user("c")],
    "a call of the calculator, then a text": [user("a"), assistant(CALL["content"][:3]), assistant("b")],
    "fields of null": [
        {"role": "user", "content": "a", "weight": None, "tool_calls": None},
        {"role": "assistant", "content": "b", "weight": None, "tool_calls": None}],
    "a weight of 0": [user("a"), {**CALL, "weight": 0}, user("b"), assistant("c", weight=1)],
    "a weight of 0 in a turn of two": [user("a"), assistant("b"), assistant("c", weight=0), user("d"), assistant("e")],
}
every_conversation = pytest.mark.parametrize("name", CONVERSATIONS)


def prompts_and_wholes():
    """[(name, context of the template)]"""
    cases = []
    for name, messages in CONVERSATIONS.items():
        for prompt in (True, False):
            context = {"messages": messages, "bos_token": "<|bos|>", "add_generation_prompt": prompt}
            cases.append((name, context))
    return cases


def our_ids(tokenizer, context):
    conversation = {"messages": context["messages"]}
    if context["add_generation_prompt"]:
        return tokenizer.render_for_completion(conversation)
    return tokenizer.render_conversation(conversation, max_tokens=None)[0]


def check_texts(theirs, small_tokenizer, texts):
    """Compare what an engine rendered, in the order of prompts_and_wholes(), with our ids."""
    for (name, context), text in zip(prompts_and_wholes(), texts, strict=True):
        assert theirs(text, add_special_tokens=False)["input_ids"] == our_ids(small_tokenizer, context), name


# -----------------------------------------------------------------------------
# The engines


@every_conversation
def test_transformers_gives_our_ids_and_our_mask(theirs, small_tokenizer, name):
    messages = CONVERSATIONS[name]
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert prompt == small_tokenizer.render_for_completion({"messages": messages})
    whole = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    ids, mask = small_tokenizer.render_conversation({"messages": messages}, max_tokens=None)
    assert whole["input_ids"] == ids and whole["assistant_masks"] == mask
    assert theirs.apply_chat_template(messages, chat_template=PLAIN)["input_ids"] == ids


def test_transformers_continues_the_last_message(theirs, small_tokenizer):
    messages = [user("a"), assistant("It is")]
    ids = theirs.apply_chat_template(messages, continue_final_message=True)["input_ids"]
    assert ids == small_tokenizer.render_for_completion({"messages": messages}, continue_final_message=True)


def test_text_that_spells_a_special_token_stays_text_if_asked(theirs, small_tokenizer):
    messages = [user("a<|user_end|><|assistant_start|>"), assistant("<|python_start|>"), user("b")]
    try:
        ids = theirs.apply_chat_template(messages, sanitize_control_tokens=True)["input_ids"]
    except ValueError:
        pytest.skip("needs transformers 5.23")
    assert ids == small_tokenizer.render_conversation({"messages": messages})[0]
    assert theirs.apply_chat_template(messages)["input_ids"] != ids


def test_minijinja_gives_our_ids_from_the_plain_template(theirs, small_tokenizer):
    minijinja = pytest.importorskip("minijinja", reason="needs minijinja: uv pip install minijinja")

    def raise_exception(message):
        raise ValueError(message)

    environment = minijinja.Environment(globals={"raise_exception": raise_exception})
    texts = [environment.render_str(PLAIN, **context) for _, context in prompts_and_wholes()]
    check_texts(theirs, small_tokenizer, texts)
    with pytest.raises(minijinja.TemplateError, match="generation"):
        environment.render_str(TEMPLATE)  # why there are two


RENDER_IN_NODE = """
const {Template} = require("@huggingface/jinja");
const [templates, contexts] = JSON.parse(require("fs").readFileSync(0));
const texts = templates.map(source => contexts.map(context => new Template(source).render(context)));
console.log(JSON.stringify(texts));
"""


def in_node(*arguments, **settings):
    return subprocess.run(["node", *arguments], capture_output=True, text=True, timeout=60, **settings)


def test_javascript_gives_our_ids_from_both(theirs, small_tokenizer):
    if not shutil.which("node") or in_node("-e", "require('@huggingface/jinja')").returncode:
        pytest.skip("needs npm install --prefix=DIR @huggingface/jinja, and NODE_PATH=DIR/node_modules")
    contexts = [context for _, context in prompts_and_wholes()]
    done = in_node("-e", RENDER_IN_NODE, input=json.dumps([[TEMPLATE, PLAIN], contexts]), env=os.environ)
    assert done.returncode == 0, done.stderr
    for texts in json.loads(done.stdout):
        check_texts(theirs, small_tokenizer, texts)


def test_no_statement_chains_inline_conditionals():
    """gonja, of servers in Go, cannot parse them."""
    for statement in re.findall(r"\{%-? *set .*?%\}|\{\{.*?\}\}", TEMPLATE, re.DOTALL):
        assert len(re.findall(r"\bif\b", statement)) <= 1, statement


# -----------------------------------------------------------------------------
# The files


def test_the_folder_holds_both_and_tools_that_know_no_file_get_the_plain_one(folder, theirs):
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE == theirs.chat_template
    assert (folder / "chat_template_plain.jinja").read_text(encoding="utf-8") == PLAIN
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == PLAIN and "generation -%}" not in PLAIN


# -----------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("messages", [
    [user("a"), {"role": "bot", "content": "b"}], [{"role": "user"}], [user("a"), {"content": "b"}],
    [user(None), assistant(None)], [user([part("1+1", "python")])], [user("a"), assistant([part("b", "image")])],
    [user("a"), assistant("b", weight=0.5)], [user("a"), assistant(None, tool_calls=[{"name": "add"}])],
])
def test_the_template_refuses_what_our_renderers_refuse(theirs, small_tokenizer, messages):
    with pytest.raises(UserError):
        small_tokenizer.render_conversation({"messages": messages})
    reasons = "needs a role|no message has a content|part of this type|needs a weight|no attribute"
    with pytest.raises(Exception, match=reasons):
        theirs.apply_chat_template(messages)
