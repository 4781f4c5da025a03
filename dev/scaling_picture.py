"""The picture of a scaling series: used by scaling.py."""

import numpy as np

from dev.scaling_fit import interval, optimal_split


def draw_law(lines, params_key, law, laws, predicted):
    """
    A matplotlib Figure with three panels: the losses by tokens, the losses by parameters at equal FLOPs, and by FLOPs,
    with the models to predict. lines: results of runs; predicted: [{depth, flops, bpb, low, high}].
    """
    from matplotlib.figure import Figure  # as in curves.py: without pyplot it needs no display

    figure = Figure(figsize=(13, 4.2), layout="constrained")  # inches
    by_tokens, by_params, by_flops = figure.subplots(1, 3)
    draw_by_tokens(by_tokens, lines, params_key, law)
    draw_by_params(by_params, lines, params_key, law)
    draw_by_flops(by_flops, lines, law, laws, predicted)
    for axes in (by_tokens, by_flops):
        axes.set_xscale("log")
    for axes in (by_tokens, by_params, by_flops):
        axes.set_ylabel("bits per byte")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    return figure


def group(lines, key):
    """{value of key: lines}, in the order of the values."""
    groups = {}
    for line in sorted(lines, key=lambda line: line[key]):
        groups.setdefault(line[key], []).append(line)
    return groups


def spread(values):
    """100 numbers from a little below to a little above, evenly on a logarithmic scale."""
    return np.geomspace(0.8 * min(values), 1.25 * max(values), 100)


def draw_by_tokens(axes, lines, params_key, law):
    """A colour for each depth: runs as dots, the law as a line."""
    axes.set_title("each depth")
    axes.set_xlabel("tokens")
    for number, (depth, runs) in enumerate(group(lines, "depth").items()):
        tokens = [run["num_tokens"] for run in runs]
        losses = [run["bpb"] for run in runs]
        errors = [2 * run["stderr"] for run in runs]
        color = f"C{number}"
        axes.errorbar(tokens, losses, errors, fmt="o", color=color, label=f"d{depth}", markersize=4)
        axes.plot(spread(tokens), law.loss(runs[0][params_key], spread(tokens)), color=color)


def draw_by_params(axes, lines, params_key, law):
    """A colour for each amount of FLOPs. The line is the law, for 6 FLOPs per parameter and token."""
    axes.set_title("equal FLOPs")
    axes.set_xlabel("depth, by its parameters N")
    for number, (flops, runs) in enumerate(group(lines, "flops").items()):
        params = np.array([run[params_key] for run in runs], dtype=float)
        tokens = np.array([run["num_tokens"] for run in runs], dtype=float)
        color = f"C{number}"
        axes.plot(params, [run["bpb"] for run in runs], "o", color=color, label=f"{flops:.1e} FLOPs", markersize=4)
        order = np.argsort(params)
        axes.plot(params[order], law.loss(params, tokens)[order], color=color)

    # the depths instead of powers of ten, which hardly differ
    params_of = {line["depth"]: line[params_key] for line in lines}
    axes.set_xscale("log")
    axes.set_xticks(list(params_of.values()), [f"d{depth}" for depth in params_of])
    axes.minorticks_off()


def draw_by_flops(axes, lines, law, laws, predicted):
    """The best loss for each amount of FLOPs, with its interval, up to the models to predict."""
    axes.set_title("larger models")
    axes.set_xlabel("FLOPs")
    flops = spread([line["flops"] for line in [*lines, *predicted]])
    best = [law.loss(*optimal_split(law, amount)) for amount in flops]
    axes.plot(flops, best, color="C0", label="optimal, by the law")
    bands = []
    for amount in flops:
        bands.append(interval([other.loss(*optimal_split(other, amount)) for other in laws]))
    low, high = np.array(bands).T
    axes.fill_between(flops, low, high, color="C0", alpha=0.2, label="90% interval")
    axes.plot([line["flops"] for line in lines], [line["bpb"] for line in lines], ".", color="gray", label="runs")
    for line in predicted:
        below = max(0.0, line["bpb"] - line["low"])
        above = max(0.0, line["high"] - line["bpb"])
        axes.errorbar(line["flops"], line["bpb"], [[below], [above]], fmt="s", color="C1", markersize=4)
        axes.annotate(f"d{line['depth']}", (line["flops"], line["high"]), fontsize=8, ha="center",
                      xytext=(0, 3), textcoords="offset points")
