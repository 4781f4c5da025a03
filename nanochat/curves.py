"""
The curves of a run: its metrics.jsonl (one JSON object a line, with `step`) as one SVG, drawn by
matplotlib.
"""

import io
import json
import math

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
    return panels


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


def draw(panels):
    """
    A matplotlib Figure with a panel per metric, in two columns. Labels give each curve's last
    value.
    """
    # imported here, since training needs no matplotlib; a Figure without pyplot needs no display
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(9.2, 2.6 * rows), layout="constrained")  # inches

    # one panel after the other, in the order of PANELS
    present = [panel for panel in PANELS if panel in panels]
    for place, panel in enumerate(present, 1):
        title, include_zero = PANELS[panel]
        axes = figure.add_subplot(rows, 2, place, title=title, xlabel="step")
        axes.grid(alpha=0.3)
        for metric, curve in panels[panel].items():
            steps, values = shorten(curve)
            style = ",.0f" if values[-1] >= 1000 else ".4g"
            label = f"{metric} {values[-1]:{style}}"
            axes.plot(steps, values, ".-", markevery=[-1], label=label)  # a dot on the last point
        if include_zero:
            axes.axhline(0, color="none")  # invisible, but the axis reaches it
        axes.legend(frameon=False)
    return figure


def to_svg(figure):
    """The text of the SVG. Letters stay text, and equal figures give equal files."""
    from matplotlib import rc_context

    # by default letters are drawn as curves, and names of parts are random
    svg = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nanochat"}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()
