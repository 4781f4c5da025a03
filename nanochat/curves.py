"""
The curves of a run: its metrics.jsonl (one JSON object a line, with `step`) as SVG, drawn by
matplotlib: one picture of all panels to lie beside the Markdown, or a picture of each panel to stand
in a page, in the page's colours.
"""

import html
import io
import json
import math
import re

import numpy as np

# A metric's panel is the last part of its name, up to an @: "val/loss" -> loss, "pass@8" -> pass.
# Each panel has a title, and says whether its y axis includes 0. If it did not, noise alone would
# fill some panels.
PANELS = {
    "loss": ("loss", False),
    "bpb": ("bits per byte", False),
    "lrm": ("learning rate", True),  # as a fraction of its peak
    "tok_per_sec": ("tokens per second", True),
    "mfu": ("model FLOPs utilisation", True),
    "grad_norm": ("gradient norm", True),
    "reward": ("reward", False),
    "pass": ("pass@k", True),
    "kl": ("KL to the start", True),
    "entropy": ("entropy", True),
}
MAX_POINTS = 300  # per curve; averaging a longer one also reduces its noise
# Of the curves in a panel, in this order. A page has variables of these names in place of the
# colours, so that they follow its theme. They can be told apart by the colour-blind (Okabe and Ito)
COLOURS = {
    "curve-1": "#0072b2",
    "curve-2": "#d55e00",
    "curve-3": "#009e73",
    "curve-4": "#cc79a7",
}


def read_panels(path):
    """
    {panel: {metric: {step: value}}} of a metrics.jsonl; {} if the file is missing. Where a resumed
    run repeats a step, its last value counts.
    """
    panels = {}
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a run that was killed while writing it

        # nan and inf cannot be drawn
        for metric, value in row.items():
            panel = metric.split("/")[-1].split("@")[0]
            if panel not in PANELS:
                continue
            if isinstance(value, int | float) and math.isfinite(value):
                curve = panels.setdefault(panel, {}).setdefault(metric, {})
                curve[row["step"]] = value
    # in the order of PANELS
    return {panel: panels[panel] for panel in PANELS if panel in panels}


def shorten(curve):
    """
    {step: value} -> (steps, values), at most MAX_POINTS each. A value is the mean of neighbours,
    drawn at the last of their steps.
    """
    # neighbours in parts of equal size
    steps = sorted(curve)
    parts = np.array_split(steps, min(MAX_POINTS, len(steps)))
    means = [np.mean([curve[step] for step in part]) for part in parts]
    return [part[-1] for part in parts], means


def describe(value):
    """A value of a curve in a few characters."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def plot(axes, panel, curves):
    """Draw the curves of a panel. Labels give each curve's last value."""
    _, include_zero = PANELS[panel]
    axes.grid(alpha=0.3)
    axes.set_prop_cycle(color=list(COLOURS.values()))
    for metric, curve in curves.items():
        steps, values = shorten(curve)
        label = f"{metric} {describe(values[-1])}"
        axes.plot(steps, values, ".-", markevery=[-1], label=label)  # a dot on the last point
    if include_zero:
        axes.axhline(0, color="none")  # invisible, but the axis reaches it
    axes.legend(frameon=False)


def draw(panels):
    """A matplotlib Figure with a panel per metric, in two columns."""
    # imported here, since training needs no matplotlib; a Figure without pyplot needs no display
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(9.2, 2.6 * rows), layout="constrained")  # inches
    for place, (panel, curves) in enumerate(panels.items(), 1):
        title, _ = PANELS[panel]
        plot(figure.add_subplot(rows, 2, place, title=title, xlabel="step"), panel, curves)
    return figure


def to_svg(figure, name="nanochat", transparent=False):
    """
    The text of the SVG. Letters stay text, and equal figures give equal files. `name`: what the ids
    in it depend on, for several pictures in one page.
    """
    from matplotlib import rc_context

    # by default letters are drawn as curves, and names of parts are random
    svg = io.StringIO()
    metadata = dict.fromkeys(["Date", "Creator", "Format", "Type"])
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(svg, format="svg", metadata=metadata, transparent=transparent)
    return svg.getvalue()


def panel_svg(panel, curves, name):
    """
    A panel as an <svg> element for a page, with its words for those who do not see it. `name` must
    be another one for each picture of the page.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.2), layout="constrained")  # inches
    plot(figure.add_subplot(xlabel="step"), panel, curves)
    svg = to_svg(figure, name, transparent=True)

    # the page's colours: black is that of its text
    svg = svg.replace("#000000", "currentColor")
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")

    # every part has an id, the same in each picture; only those of shapes that are used again, made
    # from `name`, are needed: m or p and ten digits
    svg = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", svg)

    # what it shows, in words
    title, _ = PANELS[panel]
    parts = []
    for metric, curve in curves.items():
        first = min(curve)
        last = max(curve)
        parts.append(f"{metric} from {describe(curve[first])} at step {first} to "
                     f"{describe(curve[last])} at step {last}")
    label = html.escape(f"{title}: {'; '.join(parts)}")

    # an element instead of a file, without its fixed size
    element = svg[svg.index("<svg") :]
    _, _, view_box = element.partition("viewBox=")
    return f'<svg role="img" aria-label="{label}" viewBox={view_box}'
