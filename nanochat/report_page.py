"""
The pages of the report card, rendered from what the stages recorded: report.md.j2 and
report.html.j2. The same facts go into both; the HTML also holds the curves, in one file.
"""

import re
from pathlib import Path

from markupsafe import Markup

from nanochat.curves import PANELS, panel_svg
from nanochat.report_text import (
    VALUE_FILTERS,
    as_metric,
    code,
    escape_markdown,
    format_metric,
    format_value,
    mark_tokens,
    slug,
    verbatim,
)

# The sections in the order of the pipeline, each with its column in the table of metrics
SECTIONS = {
    "Tokenizer training": None,
    "Tokenizer evaluation": None,
    "Base model training": "base",
    "Base model loss": "base",
    "Base model evaluation": "base",
    "Chat evaluation base": "base",
    "Midtraining": "mid",
    "Chat evaluation mid": "mid",
    "Chat SFT": "sft",
    "Chat evaluation sft": "sft",
    "Chat RL": "rl",
    "Chat evaluation rl": "rl",
}
COLUMNS = ("base", "mid", "sft", "rl")
# The order of the table's rows; other metrics come after these
METRICS = [
    "Strangers", "CORE", "bpb",
    "ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee", "ChatCORE",
]

# Keys of a stage's JSON, each with its default; any other key is a fact to list.
STAGE_KEYS = {
    "section": "",
    "start_time": 0.0,  # seconds since 1970
    "end_time": 0.0,
    "world_size": 1,
    "command": "",
    "config": {},
    "metrics": {},
    "curves": "",       # path of a metrics.jsonl, relative to the card's folder
    "samples": [],
    "tables": {},
    # added by Report.generate
    "panels": {},       # the curves themselves
    "picture": "",      # file name of the drawn curves
}
LAST_FACTS = ("hash", "tokenizer", "rows without text", "skipped")  # at the end of the page
MAIN_PANELS = ("reward", "loss")  # what stands for a stage: the first that it has
NUM_EXCHANGES = 3
LONG_TABLE = 12  # rows; a longer table is folded
DEFAULT_GPU_HOURLY_RATE = 3.0  # dollars for an H100, the usual rent in 2025

# -----------------------------------------------------------------------------
# The facts of the page


def collect(start, stages, rate):
    """
    What both templates show. start: the content of start.json; stages: their JSON with the keys of
    STAGE_KEYS; rate: dollars for one GPU and hour, or None.
    """
    for stage in stages:
        others = {name: value for name, value in stage.items() if name not in STAGE_KEYS}
        stage["facts"] = {name: value for name, value in others.items() if name not in LAST_FACTS}
        stage["last_facts"] = {name: others[name] for name in LAST_FACTS if name in others}

    seconds = busy_seconds(stages)
    price = hourly_price(start["environment"]["num_gpus"], stages, rate)
    ran = {stage["section"] for stage in stages}
    return {
        "start": start.get("time"),
        "environment": start["environment"],
        "stages": stages,
        "seconds": seconds,
        "cost": describe_cost(price, seconds),
        "dollars_per_s": None if price is None else price[0] * price[1] / 3600,
        "metrics": metrics_by_stage(stages),
        "missing": [name for name in SECTIONS if name not in ran],
        "long_table": LONG_TABLE,
    }


def busy_seconds(stages):
    """Wall time of all stages. Time in which two of them ran side by side counts once."""
    seconds = 0.0
    counted_until = 0.0
    for stage in sorted(stages, key=lambda stage: stage["start_time"]):
        # the part of the stage after all earlier ones
        begin = max(stage["start_time"], counted_until)
        seconds += max(0.0, stage["end_time"] - begin)
        counted_until = max(counted_until, stage["end_time"])
    return seconds


def hourly_price(num_gpus, stages, rate):
    """
    (units, dollars for one of them and hour), or None. All GPUs of the machine count, since it is
    rented whole; more if the run had more.
    """
    # a machine without GPUs has a cost only at a stated rate
    if not num_gpus and rate is None:
        return None
    units = 1  # a machine without GPUs is one unit
    if num_gpus:
        units = max([num_gpus, *(stage["world_size"] for stage in stages)])
    return units, DEFAULT_GPU_HOURLY_RATE if rate is None else rate


def describe_cost(price, seconds):
    """The cost of `seconds` at a price of hourly_price, in words."""
    if price is None:
        return "not counted: no GPU, and no --gpu_hourly_rate given"
    units, rate = price
    return f"${rate * units * seconds / 3600:,.2f} ({units} x ${rate:,.2f} an hour)"


def metrics_by_stage(stages):
    """
    {metric: {column: {value, stderr, n}}}, the known metrics first. Of several sections in a column
    the last one counts.
    """
    found = {}
    for stage in stages:
        column = SECTIONS.get(stage["section"])
        if column is None:
            continue
        for name, metric in stage["metrics"].items():
            found.setdefault(name, {})[column] = as_metric(metric)
    known = [name for name in METRICS if name in found]
    others = [name for name in found if name not in METRICS]
    return {name: found[name] for name in known + others}


def summary_rows(metrics):
    """The table of metrics for Markdown, one row dict each: {"metric": name, "base": text, ...}."""
    rows = []
    for name, columns in metrics.items():
        row = {"metric": name}
        for column in COLUMNS:
            # a metric that no stage of a column has stays a dash
            row[column] = format_metric(columns[column]) if column in columns else "–"
        rows.append(row)
    return rows


def describe_model(stages):
    """(name, {what: text}) of the model, as far as the stages have recorded it."""
    by_section = {stage["section"]: stage for stage in stages}
    base = by_section.get("Base model training", {})
    tokenizer = by_section.get("Tokenizer training", {})
    config = base.get("config", {})
    depth = config.get("depth")
    tag = config.get("model_tag") or (f"d{depth}" if depth else "")

    found = {
        "parameters": base.get("parameters"),
        "layers": depth,
        "tokens of context": config.get("max_seq_len"),
        "tokens of vocabulary": tokenizer.get("vocab size"),
        "tokens of pretraining": base.get("tokens"),
    }
    facts = {name: format_value(value) for name, value in found.items() if value is not None}
    return f"nanochat {tag}".strip(), facts


def find_examples(stages):
    """
    (stage, whether it is a chat) whose samples show best what the model can do: the answers of the
    last chat model, else the last text that a base model wrote; (None, False) without any.
    """
    for kind, is_chat in (("Chat evaluation", True), ("Base model", False)):
        found = [stage for stage in stages if stage["section"].startswith(kind) and stage["samples"]]
        if found:
            return found[-1], is_chat
    return None, False


def draw_curves(stages):
    """
    The curves as <svg> elements: (one picture of each stage that has any, {section: pictures}). A
    picture is {"title": ..., "svg": ...}.
    """
    overview = []
    by_section = {}
    for stage in stages:
        section = stage["section"]
        panels = stage["panels"]
        pictures = []
        for panel, curves in panels.items():
            # a single point is a figure, not a curve
            if all(len(curve) == 1 for curve in curves.values()):
                continue
            title, _ = PANELS[panel]
            svg = panel_svg(panel, curves, f"{slug(section)}-{panel}")
            pictures.append({"title": title, "svg": Markup(svg)})
        by_section[section] = pictures

        # the main one once more, under names of its own
        main = next((panel for panel in MAIN_PANELS if panel in panels), None)
        if main is not None:
            title, _ = PANELS[main]
            svg = panel_svg(main, panels[main], f"overview-{slug(section)}")
            overview.append({"title": f"{section}: {title}", "svg": Markup(svg)})
    return overview, by_section


# -----------------------------------------------------------------------------
# The pages


def load_template(name, **settings):
    import jinja2  # slow to import, and only `report generate` renders

    # autoescape: every printed value is text, unless a filter has made markup of it
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        **settings,
    )
    environment.filters |= VALUE_FILTERS
    environment.filters |= {"code": code, "verbatim": verbatim, "tokens": mark_tokens}
    return environment.get_template(name)


def render_markdown(card):
    """The text of report.md, from the facts of `collect`."""
    template = load_template("report.md.j2", finalize=escape_markdown)
    page = template.render(card, summary=summary_rows(card["metrics"]))
    # parts of the page that are left out leave their blank lines behind
    return re.sub(r"\n{3,}", "\n\n", page)


def render_html(card):
    """The text of report.html, from the facts of `collect`."""
    name, model = describe_model(card["stages"])
    examples, is_chat = find_examples(card["stages"])
    overview, curves = draw_curves(card["stages"])
    return load_template("report.html.j2").render(
        card,
        name=name,
        model=model,
        examples=examples,
        is_chat=is_chat,
        num_exchanges=NUM_EXCHANGES,
        overview=overview,
        curves=curves,
        columns=COLUMNS,
    )
