"""
What the report card prints: values as text, text as Markdown or HTML that shows exactly this text.
"""

import html
import math
import re
import time

from markupsafe import Markup, escape

# -----------------------------------------------------------------------------
# From values to text


def slug(text):
    """A file name from a title: slug("Chat SFT") == "chat-sft"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def format_metric(metric):
    """0.2103 ± 0.0061 (n=48,211), as far as it is known."""
    metric = as_metric(metric)
    text = format_value(metric["value"], ".4f")
    if metric["stderr"] is not None:
        text += f" ± {format_value(metric['stderr'], '.4f')}"
    if metric["n"]:
        text += f" (n={metric['n']:,})"
    return text


def as_metric(metric):
    """A metric as {value, stderr, n}. A plain number has neither error nor count."""
    if not isinstance(metric, dict):
        metric = {"value": metric}
    return {"value": None, "stderr": None, "n": None} | metric


def format_value(value, style=".4g"):
    """Numbers with separators or four digits, everything else as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {format_value(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(format_value(item) for item in value)
    # bool before int, since it is a subclass of int
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if abs(value) >= 1e15:  # FLOPs
        return f"{value:.3e}"
    # separators for large numbers, four digits for small ones
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:{style}}"


def format_date(seconds):
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def format_duration(seconds):
    # hours without seconds
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    return f"{minutes}m {seconds:02d}s"


def list_columns(rows):
    """The keys of all row dicts, in the order of their first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def continuation(sample):
    """What the model wrote after the prompt. The samples of a base model begin with it."""
    prompt = sample["prompt"].strip()
    return sample["text"].strip().removeprefix(prompt).strip()


def split_metric(metric):
    """
    (value, standard error) as texts, with two digits of the error and as many decimals of the
    value; the error is None where it is not known.

    >>> split_metric({"value": 0.48370, "stderr": 0.03684})
    ('0.484', '0.037')
    """
    metric = as_metric(metric)
    value = metric["value"]
    error = metric["stderr"]
    if not error or not math.isfinite(error):
        return format_value(value, ".4f"), None
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{decimals}f}", f"{error:,.{decimals}f}"


def format_facts(facts):
    """{name: value} -> [(name, text)]"""
    return [(name, format_value(value)) for name, value in facts.items()]


def format_metrics(metrics):
    """{name: metric} -> [(name, text)]"""
    return [(name, format_metric(metric)) for name, metric in metrics.items()]


def format_counts(by_column):
    """
    How many problems a metric was measured on: "200", or "200 to 1,319" if the stages differ.

    >>> format_counts({"sft": {"n": 200}, "rl": {"n": None}})
    '200'
    """
    counts = {metric["n"] for metric in by_column.values() if metric["n"]}
    if not counts:
        return "–"
    return " to ".join(f"{n:,}" for n in sorted({min(counts), max(counts)}))


# the filters of both templates
VALUE_FILTERS = {
    "metric": format_metric,
    "split": split_metric,
    "facts": format_facts,
    "metric_facts": format_metrics,
    "counts": format_counts,
    "value": format_value,
    "date": format_date,
    "duration": format_duration,
    "columns": list_columns,
    "continuation": continuation,
}

# -----------------------------------------------------------------------------
# From text to Markdown


def escape_markdown(text):
    """
    Text -> Markdown that shows exactly this text, in a paragraph or a table. Markup stays as it is.
    """
    if isinstance(text, Markup):
        return text
    # an underscore within a word is no markup, and device_batch_size reads better without
    # backslashes
    special = r"[\\`*\[\]|~#$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"
    text = re.sub(special, lambda match: "\\" + match.group(), str(text))
    text = html.escape(text, quote=False)
    return Markup(text.replace("\r", "").replace("\n", "<br>"))


def code(value):
    """A value between backticks, in a table."""
    # in a table a | would end the cell, and a backtick the code
    text = " ".join(str(value).splitlines())
    return Markup("`" + text.replace("`", "'").replace("|", "\\|") + "`")


def verbatim(text):
    """Text for a fenced block, without the fence that would end it."""
    return Markup(text.replace("```", "'''"))


# -----------------------------------------------------------------------------
# From text to HTML

# In escaped text: a call of the calculator, perhaps with its result, and any special token
CALL = re.compile(
    r"&lt;\|python_start\|&gt;(.*?)&lt;\|python_end\|&gt;"
    r"(?:&lt;\|output_start\|&gt;(.*?)&lt;\|output_end\|&gt;)?",
    re.DOTALL,
)
TOKEN = re.compile(r"&lt;\|([a-z_]+)\|&gt;")


def mark_tokens(text):
    """
    Text of a model as HTML: calls of the calculator stand out, other special tokens step back.

    >>> print(mark_tokens("<|python_start|>6*7<|python_end|><|output_start|>42<|output_end|> a<b"))
    <code class="call">6*7 = 42</code> a&lt;b
    """
    def show_call(match):
        call = match[1] if match[2] is None else f"{match[1]} = {match[2]}"
        return f'<code class="call">{call}</code>'

    # escaped first, so that nothing in the text can be an element
    text = CALL.sub(show_call, str(escape(text)))
    text = TOKEN.sub(r'<span class="token">\1</span>', text)
    return Markup(text)
