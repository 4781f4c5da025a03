"""
Talk to a model in the terminal, or let a base model complete text.

    python -m scripts.chat_cli                                  (a chat with the newest SFT model)
    python -m scripts.chat_cli -p "Why is the sky blue?"        (one answer on stdout, nothing else)
    python -m scripts.chat_cli -i base -p "Once upon a time"    (a base model continues the text)
"""

import argparse
import sys

from nanochat.checkpoint_manager import STAGE_DIRS, load_checkpoint
from nanochat.common import compute_init, run_script
from nanochat.engine import Engine, TextStream

HELP = "commands: /clear forget the conversation, /system TEXT set the system message, /help, /quit (or Ctrl-D)\n" \
       'multi-line input: begin and end with """'


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    return parser.parse_args()


def fit_prompt(messages, system, tokenizer, max_prompt):
    """
    (prompt ids, number of messages left out): the conversation rendered for completion; while it is longer than
    max_prompt tokens its oldest exchange goes, never the system message or the newest question.
    """
    for start in range(0, len(messages), 2):
        head = [{"role": "system", "content": system}] if system else []
        ids = tokenizer.render_for_completion({"messages": head + messages[start:]})
        if len(ids) <= max_prompt:
            return ids, start
    return [ids[0], *ids[-(max_prompt - 1):]], len(messages) - 1  # one message alone is too long: keep its end


def answer(engine, prompt, args, seed):
    """Stream the answer to stdout; returns its text. Ctrl-C ends the answer, not the program."""
    stream, text = TextStream(engine.tokenizer), ""
    settings = dict(max_tokens=args.max_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    try:
        for (token,), _ in engine.generate(prompt, seed=seed, **settings):
            piece = stream.feed(token)
            print(piece, end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        print("\n(stopped)", file=sys.stderr)
    end = stream.flush()
    print(end, flush=True)
    return text + end


def read_message():
    """One message from the terminal; several lines between triple quotes."""
    line = input("\nUser: ").strip()
    if not line.startswith('"""'):
        return line
    lines = [line[3:]]
    while not lines[-1].endswith('"""'):
        lines.append(input("... "))
    return "\n".join(lines)[:-3].strip()


def chat(engine, args):
    """The conversation: read, answer, remember."""
    messages, system, turn = [], args.system, 0
    context = engine.model.config.sequence_len
    max_prompt = max(8, context - min(args.max_tokens, context // 2))
    print(HELP)
    while True:
        try:
            message = read_message()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, rest = message.partition(" ")
        if command in ("/quit", "/exit", "quit", "exit"):
            return
        if command in ("/clear", "/system"):
            messages, system = [], rest if command == "/system" else system
            print("(new conversation)")
        elif command.startswith("/"):
            print(HELP)
        elif message:
            messages.append({"role": "user", "content": message})
            prompt, dropped = fit_prompt(messages, system, engine.tokenizer, max_prompt)
            if dropped:
                print(f"(the context of {context} tokens is full: the first {dropped} messages are forgotten)")
                messages = messages[dropped:]
            print("Assistant: ", end="", flush=True)
            turn += 1
            messages.append({"role": "assistant", "content": answer(engine, prompt, args, args.seed + turn)})


def main():
    args = parse_args()
    _, _, _, device = compute_init(args.device_type)
    model, tokenizer, _ = load_checkpoint(args.source, device, args.model_tag, args.step)
    engine = Engine(model, tokenizer)
    if args.source == "base":  # a base model knows no turns: it continues text
        prompt = args.prompt if args.prompt is not None else input("Text to continue: ")
        print(prompt, end="", flush=True)
        answer(engine, tokenizer(prompt, prepend=tokenizer.get_bos_token_id()), args, args.seed)
    elif args.prompt is not None:
        messages = [{"role": "user", "content": args.prompt}]
        prompt, _ = fit_prompt(messages, args.system, tokenizer, model.config.sequence_len - 8)
        answer(engine, prompt, args, args.seed)
    else:
        chat(engine, args)


if __name__ == "__main__":
    run_script(main)
