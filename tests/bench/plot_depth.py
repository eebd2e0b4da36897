"""Draws accuracy over depth from the results of `compare_settings.py --out`.

    python tests/bench/plot_depth.py RESULTS.jsonl ... --out FILE.png [--title TEXT] [--settings NAME ...]

The depth of a result is the number of its weight layers, from `model.stages`; its setting is the name before " @".
Points are seeds, the line is their mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from spikefleet.config.recipes import load_config, parse_overrides


def weight_layers(recipe: str, overrides: list[str]) -> int:
    """Convolutions and the classifier on the longest path: two in each block, and the first and the last one."""
    of_the_model = [override for override in overrides if override.startswith("model.")]  # the rest may need a GPU
    stages = load_config(recipe, parse_overrides(of_the_model)).model.model_dump()["stages"]
    return 2 * sum(stages) + 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--title", default="Accuracy over depth")
    parser.add_argument("--settings", nargs="*", metavar="NAME[=LABEL]", help="these only, in this order")
    given = parser.parse_args()
    labels = dict(setting.partition("=")[::2] for setting in given.settings or [])
    found: dict[str, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for path in given.results:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            name = row["name"].partition(" @")[0]
            if labels and name not in labels:
                continue
            depth = weight_layers(row["recipe"], row["overrides"])
            found[name][depth][row["seed"]] = 100 * row["test"]["top1"]
    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.subplots()
    shown: set[int] = set()
    for name in labels or sorted(found):
        depths = sorted(found[name])
        shown.update(depths)
        means = [statistics.fmean(found[name][depth].values()) for depth in depths]
        (line,) = axes.plot(depths, means, label=labels.get(name) or name)
        for depth in depths:
            values = list(found[name][depth].values())
            axes.plot([depth] * len(values), values, "o", color=line.get_color(), markersize=4, alpha=0.6)
    axes.set(xlabel="weight layers", ylabel="test top-1 (%)", title=given.title)
    axes.set_xticks(sorted(shown))
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(given.out, dpi=120)


if __name__ == "__main__":
    main()
