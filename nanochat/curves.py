"""
The curves of a run as a picture: a metrics.jsonl (one JSON object a line, with `step`) becomes one SVG of panels, on
paper-white, with nothing but the standard library. Leaves out all that a plotting library is for: zoom, log scales,
styles.
"""

import html
import json
import math
import re

# One panel for each of these that the file has: the title; what a key ("lr/matrix" as "lr_matrix") or the last part of
# it ("val/bpb" as "bpb") must match; whether the axis starts at 0 (else noise alone would fill the panel).
CHARTS = [("loss", "(smooth_)?loss", False), ("bits per byte", "bpb", False),
          ("learning rate", "lrm?|lr_.*|learning_rate", True), ("tokens per second", "tok(en)?s?_per_sec", True),
          ("model FLOPs utilisation", "mfu.*", True), ("gradient norm", "grad_?norm", True),
          ("memory", "(peak_)?mem(ory)?(_.*)?", True), ("reward", ".*reward.*", False), ("pass@k", "pass@.*", True),
          ("KL to the start", "kl.*", True), ("entropy", "entropy", True), ("CORE", "core", False),
          ("accuracy", "acc(uracy)?", True)]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 250, 58, 18, 44, 36  # of one panel and its margins, in pixels
COLORS = ["#2563eb", "#d97706", "#059669", "#9333ea"]
MAX_POINTS = 300  # of a curve: more than a panel has room for

# -----------------------------------------------------------------------------
# metrics.jsonl -> panels: [(title, {key: [(step, value)]}, starts at 0)]


def read_panels(paths):
    """What the files hold, as panels in the order of CHARTS. A missing file counts as an empty one."""
    curves = {}  # key -> {step: value}; a step that a resumed run repeats counts as it went the last time
    for path in paths:
        for line in path.read_text("utf-8").splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a run that was killed while it wrote
            for key, value in row.items() if "step" in row else ():
                if isinstance(value, int | float) and math.isfinite(value):
                    curves.setdefault(key, {})[row["step"]] = value
    panels = []
    for title, pattern, from_zero in CHARTS:
        keys = [key for key in curves
                if any(re.fullmatch(pattern, name.lower()) for name in (key.split("/")[-1], key.replace("/", "_")))]
        panel = {key: _thin(sorted(curves[key].items())) for key in keys[:len(COLORS)]}
        panels += [(title, panel, from_zero)] if panel else []
    return panels


def _thin(points):
    """At most MAX_POINTS points: means of equal runs of neighbours, so that noise shrinks and nothing is picked."""
    size = math.ceil(len(points) / MAX_POINTS)
    runs = [points[i:i + size] for i in range(0, len(points), size)]
    return [(run[-1][0], sum(value for _, value in run) / len(run)) for run in runs]


# -----------------------------------------------------------------------------
# Panels -> SVG


def draw(panels):
    """The text of an SVG with the panels in two columns."""
    columns = min(2, len(panels))
    width, height = WIDTH * columns, HEIGHT * math.ceil(len(panels) / columns)
    body = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="Helvetica, Arial, sans-serif" font-size="11" fill="#475569">',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>']
    for i, panel in enumerate(panels):
        x, y = i % columns * WIDTH, i // columns * HEIGHT
        body += [f'<g transform="translate({x} {y})">', *_draw_panel(*panel), "</g>"]
    return "\n".join(body + ["</svg>"]) + "\n"


def _draw_panel(title, lines, from_zero):
    """Title and last values on top, grid and ticks, one line per key; in pixels from the panel's upper left corner."""
    steps, values = zip(*(point for points in lines.values() for point in points), strict=True)
    low, high = min(values), max(values)
    y_low, y_high, y_ticks = _axis(min(low, 0) if from_zero else low, high, 5)
    x_low, x_high = (0 if 0 <= min(steps) < 0.05 * max(steps) else min(steps)), max(max(steps), min(steps) + 1)

    def at(step, value):  # SVG counts y downwards
        return (LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM))

    body = [f'<text x="{LEFT}" y="20" font-size="13" font-weight="bold" fill="#0f172a">{html.escape(title)}</text>',
            f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end" fill="#94a3b8">step</text>']
    for tick, label in y_ticks:
        y = at(x_low, tick)[1]  # + 4 centres the label on its line
        body += [f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e2e8f0"/>',
                 f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>']
    for tick, label in _axis(x_low, x_high, 6)[2]:
        x, y = at(tick, y_low)
        if x_low <= tick <= x_high:  # the curve fills the width, so round ticks may lie outside
            body += [f'<path d="M{x:.1f} {y:.1f}v4" stroke="#94a3b8"/>',
                     f'<text x="{x:.1f}" y="{y + 17:.1f}" text-anchor="middle">{label}</text>']
    for i, points in enumerate(lines.values()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        x, y = at(*points[-1])
        body += [f'<polyline points="{path}" fill="none" stroke="{COLORS[i]}" stroke-width="1.8"/>',
                 f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{COLORS[i]}"/>']
    legend = []
    for i, (key, points) in enumerate(lines.items()):
        name = key[-24:] if len(lines) < 3 else key.split("/")[-1][:10]  # up to four fit on one line
        last = f"{points[-1][1]:,.0f}" if abs(points[-1][1]) >= 1000 else f"{points[-1][1]:.4g}"
        legend.append(f'<tspan fill="{COLORS[i]}" dx="{10 if i else 0}">{html.escape(name)} {last}</tspan>')
    return body + [f'<text x="{WIDTH - RIGHT}" y="36" text-anchor="end">{"".join(legend)}</text>']


def _axis(low, high, count):
    """About `count` round ticks (steps of 1, 2 or 5) around [low, high] -> (lowest, highest, [(tick, label)])."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):  # a constant: some room on both sides of it
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / count  # then rounded up to the next 1, 2 or 5 times a power of ten
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * nice for nice in (1, 2, 5, 10) if base * nice >= raw * (1 - 1e-9))
    ticks = [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]
    units = [(1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"), (0, 1, "")]  # (from, divisor, suffix)
    scale, suffix = next(unit[1:] for unit in units if max(map(abs, ticks)) >= unit[0])
    # as many decimals as the step has, so that no two ticks read the same
    decimals = max(0, -math.floor(math.log10(step / scale) + 1e-9))
    style = f".{decimals}f" if decimals <= 5 else ".1e"
    return ticks[0], ticks[-1], [(tick, f"{tick / scale:{style}}{suffix}" if tick else "0") for tick in ticks]
