"""
Talk to a model in the terminal, or let a base model complete text.

    python -m scripts.chat_cli                                  (a chat with the newest SFT model)
    python -m scripts.chat_cli -p "Why is the sky blue?"        (one answer on stdout, nothing else)
    python -m scripts.chat_cli -i base -p "Once upon a time"    (a base model continues the text)
"""

import sys
from contextlib import suppress
from itertools import groupby

from nanochat.checkpoint_manager import STAGE_DIRS, load_checkpoint
from nanochat.common import UserError, compute_init, run_script
from nanochat.configurator import ArgumentParser
from nanochat.engine import Engine, Sampling, TextStream, fit_conversation
from nanochat.scheduler import BLOCKS

HELP = "commands: /clear forget the conversation, /system TEXT set the system message, /help, /quit (or Ctrl-D)\n" \
       'multi-line input: begin and end with """'
DIM, PLAIN = "\033[2m", "\033[0m"
CONTROL = {i: "\ufffd" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}  # a terminal would obey them
INTERRUPTED = 130  # exit status, as shells have it
SHOWN = {"python_start": f"{DIM}[", "python_end": f"] {PLAIN}", "output_start": f"{DIM}= ", "output_end": f" {PLAIN}"}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("-i", "--source", default="sft", choices=STAGE_DIRS, help="stage of the model (default: sft)")
    parser.add_argument("-g", "--model_tag", "--model-tag", help="model to load (default: the one saved last)")
    parser.add_argument("-s", "--step", type=int, help="step to load (default: the last)")
    parser.add_argument("-p", "--prompt", help="answer this one prompt and end")
    parser.add_argument("--system", default="", help="system message")
    parser.add_argument("-t", "--temperature", type=float, default=0.6, help="0 = always the likeliest (default: 0.6)")
    parser.add_argument("-k", "--top_k", "--top-k", type=int, default=50, help="0 = off (default: 50)")
    parser.add_argument("--top_p", "--top-p", type=float, help="nucleus sampling (default: off)")
    parser.add_argument("--seed", type=int, default=42, help="of the samples (default: 42)")
    parser.add_argument("-n", "--max_tokens", "--max-tokens", type=int, default=256, help="per answer (default: 256)")
    parser.add_argument("--device_type", "--device-type", default="", help="cuda, mps or cpu (default: detect)")
    return parser.parse_args(argv)


def answer(engine, prompt, args, seed, show_tools=False):
    """
    Stream the answer to stdout. Returns its parts, so that the model later reads the turn that it wrote, and whether
    Ctrl-C cut it short. Tool calls are shown dimmed, or not at all.
    """
    tokenizer = engine.tokenizer
    stream, kind, pieces = TextStream(tokenizer), "text", []  # pieces: [(kind, text)]
    fences = {tokenizer.encode_special(f"<|{name}|>"): name for name in BLOCKS}
    settings = dict(max_tokens=args.max_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    unsafe, stopped = CONTROL if sys.stdout.isatty() else {}, False
    try:
        for (token,), _ in engine.generate(prompt, seed=seed, **settings):
            fence = fences.get(token)
            pieces.append((kind, stream.flush() if fence else stream.feed(token)))
            text = pieces[-1][1].translate(unsafe) if kind == "text" or show_tools else ""
            print(text + (SHOWN.get(fence, "") if show_tools else ""), end="", flush=True)
            kind = BLOCKS.get(fence, kind)
    except KeyboardInterrupt:
        stopped = True
        print("\n(stopped)", file=sys.stderr)
    pieces.append((kind, stream.flush()))
    print(pieces[-1][1] + (PLAIN if show_tools else ""), flush=True)
    groups = groupby(pieces, key=lambda piece: piece[0])
    return [{"type": kind, "text": "".join(text for _, text in group)} for kind, group in groups], stopped


def read_message():
    """(text, may it be a command) from the terminal; several lines between triple quotes are text and nothing else."""
    line = input("\nUser: ").strip()
    if not line.startswith('"""') or ('"""' in line[3:] and not line.endswith('"""')):
        return line, True
    lines = [line[3:]]
    with suppress(EOFError):  # the end of the input closes the quotes, too
        while not lines[-1].endswith('"""'):
            lines.append(input("... ").rstrip())
    return "\n".join(lines).removesuffix('"""').strip(), False


def chat(engine, args):
    """The conversation: read, answer, remember."""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (its import gives input() arrow keys and a history)
    messages, system, turn = [], args.system, 0
    context = engine.model.config.sequence_len
    max_prompt = max(8, context - min(args.max_tokens, context // 2))
    print(HELP)
    while True:
        try:
            message, maybe_command = read_message()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # what was typed is dropped, not what was said
            print("\n(/quit or Ctrl-D ends)")
            continue
        if maybe_command and message in ("/quit", "/exit", "quit", "exit"):
            return
        command, _, rest = message.partition(" ")
        if maybe_command and command in ("/clear", "/system"):
            messages, system = [], rest if command == "/system" else system
            print("(new conversation)")
        elif maybe_command and command.startswith("/"):
            print(HELP)
        elif message:
            messages.append({"role": "user", "content": message})
            head = [{"role": "system", "content": system}] if system else []
            try:
                prompt, dropped = fit_conversation(engine.tokenizer, head + messages, max_prompt)
            except ValueError as error:
                print(f"({error}: shorten it)")
                messages.pop()
                continue
            if dropped:
                print(f"(the context of {context} tokens is full: the first {dropped} messages are forgotten)")
                messages = messages[dropped:]
            print("Assistant: ", end="", flush=True)
            turn += 1
            parts, _ = answer(engine, prompt, args, args.seed + turn, show_tools=sys.stdout.isatty())
            messages.append({"role": "assistant", "content": parts})


def complete(engine, args):
    """Continue one text. Returns whether Ctrl-C cut it short."""
    try:
        prompt = args.prompt if args.prompt is not None else input("Text to continue: ")
    except (EOFError, KeyboardInterrupt):
        print()
        return False
    tokens = engine.tokenizer(prompt, prepend=engine.tokenizer.get_bos_token_id())
    context = engine.model.config.sequence_len
    if len(tokens) >= context:
        raise UserError(f"the text has {len(tokens)} tokens, the model's context is {context}", "give a shorter text")
    print(prompt, end="", flush=True)
    return answer(engine, tokens, args, args.seed)[1]


def main():
    args = parse_args()
    try:
        if args.max_tokens < 1:
            raise ValueError(f"max_tokens={args.max_tokens}: need 1 or more")
        Sampling(args.temperature, args.top_k, args.top_p)
    except ValueError as error:
        raise UserError(str(error), "leave the flag out for its default") from error
    if args.system and args.source == "base":
        raise UserError("--system: a base model continues text and knows no turns", "ask another stage, with -i sft")
    _, _, _, device = compute_init(args.device_type)
    model, tokenizer, _ = load_checkpoint(args.source, device, args.model_tag, args.step)
    engine = Engine(model, tokenizer)
    stopped = False
    if args.source == "base":  # a base model knows no turns: it continues text
        stopped = complete(engine, args)
    elif args.prompt is not None:
        messages = [{"role": "system", "content": args.system}] if args.system else []
        messages.append({"role": "user", "content": args.prompt})
        try:
            prompt, _ = fit_conversation(tokenizer, messages, model.config.sequence_len - 8)
        except ValueError as error:
            raise UserError(f"-p does not fit the model's context: {error}", "ask something shorter") from error
        _, stopped = answer(engine, prompt, args, args.seed)
    else:
        chat(engine, args)
    if stopped:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    run_script(main)
