"""
Chat with a model in the terminal, or let a base model continue a text.

    python -m scripts.chat_cli                                  (a chat with the newest SFT model)
    python -m scripts.chat_cli -p "Why is the sky blue?"        (one answer on stdout, nothing else)
    python -m scripts.chat_cli -i base -p "Once upon a time"    (a base model continues the text)
"""

import sys
from contextlib import suppress

from nanochat.checkpoint_manager import STAGE_DIRS, load_checkpoint
from nanochat.common import UserError, compute_init, run_script
from nanochat.configurator import ArgumentParser, switch
from nanochat.conversation import PART_AFTER
from nanochat.engine import Engine, Sampling, fit_conversation
from nanochat.streaming import TextStream

HELP = """\
commands: /clear forget the conversation, /system TEXT set the system message, /help, /quit (or Ctrl-D)
multi-line input: begin and end with \"""\
"""
INTERRUPTED = 130  # exit status after Ctrl-C, as in shells

# Escape sequences of terminals, and the control characters that a terminal would obey if a model wrote them
DIM = "\033[2m"
PLAIN = "\033[0m"
CONTROL = {i: "\ufffd" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}

# How a terminal shows the special tokens around a tool call and its result
MARKS = {
    "<|python_start|>": f"{DIM}[",
    "<|python_end|>": f"] {PLAIN}",
    "<|output_start|>": f"{DIM}= ",
    "<|output_end|>": f" {PLAIN}",
}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    # which model
    add("-i", "--source", default="sft", choices=STAGE_DIRS, help="stage of the model (default: sft)")
    add("-g", "--model_tag", "--model-tag", help="model to load (default: the one saved last)")
    add("-s", "--step", type=int, help="step to load (default: the last)")
    add("--verify", type=switch, default=True, metavar="BOOL",
        help="false: load without comparing files with their checksums (default: true)")
    add("--device_type", "--device-type", default="", help="cuda, mps or cpu (default: detect)")
    # what to ask
    add("-p", "--prompt", action="append", help="answer this one prompt and end; may be repeated")
    add("--system", default="", help="system message")
    # how to sample
    add("-t", "--temperature", type=float, default=0.6, help="0 = greedy (default: 0.6)")
    add("-k", "--top_k", "--top-k", type=int, default=50, help="0 = off (default: 50)")
    add("--top_p", "--top-p", type=float, help="nucleus sampling (default: off)")
    add("--seed", type=int, default=42, help="of the samples (default: 42)")
    add("-n", "--max_tokens", "--max-tokens", type=int, default=256, help="per answer (default: 256)")
    args = parser.parse_args(argv)

    # the sampling settings are checked where they are used, but before a model is loaded
    try:
        if args.max_tokens < 1:
            raise ValueError(f"max_tokens={args.max_tokens}: need 1 or more")
        Sampling(args.temperature, args.top_k, args.top_p)
    except ValueError as error:
        raise UserError(str(error), "leave the flag out for its default") from error
    if args.system and args.source == "base":
        raise UserError(
            "--system: a base model continues text and has no system message",
            "use a chat model, with -i sft",
        )
    return args


def answer(engine, prompt, args, seed, show_tools=False):
    """
    Print the answer to `prompt` (token ids) while it is generated. Tool calls are shown dimmed, or not at all.

    Returns (parts, stopped): the parts of the assistant's message, so that the model later reads exactly what it
    wrote, and whether Ctrl-C cut it short.
    """
    tokenizer = engine.tokenizer
    marks = {tokenizer.encode_special(name): name for name in MARKS}  # ids of these tokens
    # piped output is passed on unchanged
    unsafe = CONTROL if sys.stdout.isatty() else {}
    stream = TextStream(tokenizer)
    parts = [{"type": "text", "text": ""}]
    stopped = False

    def write(text):
        """Add text to the last part, and print it."""
        parts[-1]["text"] += text
        if parts[-1]["type"] == "text" or show_tools:
            print(text.translate(unsafe), end="", flush=True)

    tokens = engine.generate(
        prompt,
        seed=seed,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
    )
    try:
        for (token,), _ in tokens:
            if token not in marks:
                write(stream.feed(token))
                continue
            # a tool call or its result begins or ends
            name = marks[token]
            write(stream.flush())
            parts.append({"type": PART_AFTER[name], "text": ""})
            if show_tools:
                print(MARKS[name], end="", flush=True)
    except KeyboardInterrupt:
        stopped = True
        print("\n(stopped)", file=sys.stderr)
    write(stream.flush())
    print(PLAIN if show_tools else "", flush=True)
    return parts, stopped


# -----------------------------------------------------------------------------
# The three modes: a conversation, one answer, a text to continue


def with_system(system, messages):
    """The conversation with its system message in front, if there is one."""
    return [{"role": "system", "content": system}] + messages if system else messages


def read_message():
    """(text, quoted) from the terminal. Quoted: between triple quotes, over several lines, and never a command."""
    line = input("\nUser: ").strip()
    ends_within_line = '"""' in line[3:] and not line.endswith('"""')
    if not line.startswith('"""') or ends_within_line:
        return line, False

    # read on until the closing quotes; the end of the input closes them, too
    lines = [line[3:]]
    with suppress(EOFError):
        while not lines[-1].endswith('"""'):
            lines.append(input("... ").rstrip())
    return "\n".join(lines).removesuffix('"""').strip(), True


def chat(engine, args):
    """A conversation at the prompt. Returns at /quit or the end of the input."""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (importing it gives input() arrow keys and a history)
    # the state of the conversation
    messages = []
    system = args.system
    seed = args.seed
    print(HELP)
    while True:
        try:
            message, quoted = read_message()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # drops the line that is being typed, keeps the conversation
            print("\n(/quit or Ctrl-D ends)")
            continue

        # commands: a line that is quoted, or begins otherwise, is a message
        if not quoted and message in ("/quit", "/exit", "quit", "exit"):
            return
        if not quoted and message.startswith("/"):
            command, _, rest = message.partition(" ")
            if command == "/system":
                system = rest
            if command in ("/system", "/clear"):
                messages = []
                print("(new conversation)")
            else:
                print(HELP)
            continue

        # a message, each with random numbers of its own
        if message:
            seed += 1
            messages = reply(engine, args, system, messages + [{"role": "user", "content": message}], seed)


def reply(engine, args, system, messages, seed):
    """Answer the last message. Returns the conversation that goes on: without what no longer fits, with the answer."""
    # the oldest exchanges go when the context is full; the answer gets at most half of it
    context = engine.model.config.sequence_len
    max_prompt = max(8, context - min(args.max_tokens, context // 2))
    try:
        prompt, num_dropped = fit_conversation(engine.tokenizer, with_system(system, messages), max_prompt)
    except ValueError as error:
        print(f"({error}: shorten it)")
        return messages[:-1]
    if num_dropped:
        print(f"(the context of {context} tokens is full: the first {num_dropped} messages are forgotten)")
    print("Assistant: ", end="", flush=True)
    parts, _ = answer(engine, prompt, args, seed, show_tools=sys.stdout.isatty())
    return messages[num_dropped:] + [{"role": "assistant", "content": parts}]


def answer_once(engine, args, prompt):
    """Answer the prompt of a -p. Returns whether Ctrl-C cut the answer short."""
    messages = with_system(args.system, [{"role": "user", "content": prompt}])
    max_prompt = engine.model.config.sequence_len - 8
    try:
        ids, _ = fit_conversation(engine.tokenizer, messages, max_prompt)
    except ValueError as error:
        raise UserError(f"-p does not fit the model's context: {error}", "ask something shorter") from error
    if len(args.prompt) > 1:  # or nobody knows which answer it is
        print(f"> {prompt}")
    _, stopped = answer(engine, ids, args, args.seed)
    return stopped


def complete(engine, args, prompt=None):
    """
    Let a base model continue one text, asked for if it is None. Returns whether Ctrl-C cut it short.
    """
    try:
        prompt = input("Text to continue: ") if prompt is None else prompt
    except (EOFError, KeyboardInterrupt):
        print()
        return False

    # a document starts with <|bos|>, and at least one token must fit behind it
    tokens = engine.tokenizer(prompt, prepend=engine.tokenizer.get_bos_token_id())
    context = engine.model.config.sequence_len
    if len(tokens) >= context:
        raise UserError(
            f"the text has {len(tokens)} tokens, the model's context is {context}", "give a shorter text"
        )
    print(prompt, end="", flush=True)
    _, stopped = answer(engine, tokens, args, args.seed)
    return stopped


def main():
    # init, model
    args = parse_args()
    _, _, _, device = compute_init(args.device_type)
    model, tokenizer, _ = load_checkpoint(args.source, device, args.model_tag, args.step, args.verify)
    engine = Engine(model, tokenizer)

    # one of the three modes; a base model knows no conversations
    act = complete if args.source == "base" else answer_once
    if args.prompt is not None:
        stopped = any(act(engine, args, prompt) for prompt in args.prompt)
    elif args.source == "base":
        stopped = complete(engine, args)
    else:
        stopped = chat(engine, args)
    if stopped:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    run_script(main)
