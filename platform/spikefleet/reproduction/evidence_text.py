"""What the page of evidence says in words: how to read it, how rows were trained, rows that seeds scatter."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from spikefleet.config.schema import leaves
from spikefleet.gates.paired import ALPHA
from spikefleet.reproduction.evidence import TableEvidence
from spikefleet.reproduction.paired_seeds import POWER
from spikefleet.reproduction.rows import value_of

SEEDS = (3, 5, 10)
"""For how many seeds the page says what they can show."""

WIDE = 5.0
"""Standard deviation over seeds, in points, from which on a row's values are listed."""

LARGEST_RATIO = 100.0
"""Of our difference to the paper's, above which it is not shown."""

READ = (
    "A claim is that one row of a table differs from another in one direction, at one or several depths or T. "
    "Each row is trained with several seeds, and differences are formed between trainings of one seed. A "
    "difference is **shown** if it has the claimed sign, and p of the two-sided paired t-test is at most "
    f"{ALPHA:.0%} after Holm's adjustment for all comparisons of the table (the paper's and this project's "
    "apart; those not run count with p = 1); **reversed** if it has the opposite sign and is as clear; else "
    "**open**. With one seed alone nothing is judged. Claims are the papers' sentences, or read off their "
    "tables; some of the latter were added after the results, so that each row that was trained is judged.",
    "",
    "| verdict | of the claim's comparisons |",
    "| --- | --- |",
    "| holds | all were run, and all are shown |",
    "| holds in part | some are shown; others are open, reversed or not run |",
    "| not shown at this scale | none is shown, and none reversed: an effect may be smaller than these seeds "
    "show, or go the other way |",
    "| contradicted in part | some are reversed, and none is shown; others are open or not run |",
    "| contradicted | all were run, and all are reversed |",
    "| not run yet | none was run with two seeds |",
    "",
    "* Networks at the smaller scales train for minutes: a deeper one may be behind for want of training. What "
    "holds or is contradicted there holds or is contradicted for short trainings of narrow networks, no more.",
    "* Accuracies on other data and of other networks are other quantities: the paper's differences stand "
    "beside ours, and ours / paper's says how large the effect is, not how near a reproduction came. It is "
    "left out above 100, where the paper's difference is next to nothing, and for energy, which is another "
    "network's.",
    "* Means are over the seeds that both rows have, so that a row can have two means on this page.",
    "* A seed decides the initial weights and the order of the images. The images themselves, in training and "
    "test, are the same for all seeds, so intervals say nothing of other images. Networks of two depths share "
    "no initial weights, whatever their seeds.",
    "* Intervals are each comparison's own, not adjusted: one may exclude 0 where the adjusted p leaves it "
    "open. The t-test takes differences to be normal; where some seeds train and others do not, they are not, "
    f"and the values of such rows (standard deviation above {WIDE:g} points) are listed by seed. Holm's "
    "adjustment is over a table; tables share rows.",
    "* Behind +- stands the standard deviation over seeds; effect sizes are in standard deviations over the "
    f"seeds of a row. The last column is the smallest true difference that {', '.join(map(str, SEEDS))} seeds "
    f"would show with probability {POWER:.0%}, were it the only comparison.",
    "",
    "Words: T time steps; D the largest integer of an I-LIF neuron, which is D binary steps at inference. BSG "
    "and BSG* are the spiking gates of SG ResNet at the end of a residual block, IAND and ADD those of SEW "
    "ResNet; ADD's output is an integer, the others' a spike. ASD is the attention spike decoder, rate the "
    "mean over T. SNN-Block-1 of SpikeYOLO mixes channels by standard convolutions, SNN-Block-2 by "
    "re-parameterised ones. The balance coefficient weighs side branches in the loss; evolutionary training "
    "lets it fall to 0. Spiking ResNet adds the shortcut before its last neuron (post-addition), SEW ResNet "
    "after it.",
)
"""How to read the page; the rule is that of `JudgedClaim.verdict`."""

_SETTINGS = (
    "train.epochs",
    "train.global_batch",
    "data.options.train_images",
    "data.options.train",
    "data.transform.size",
    "data.transform.representation.size",
    "data.transform.window",
    "model.stages",
    "model.width",
    "model.depth",
    "model.timesteps",
    "model.connection",
    "model.gate_gradient",
    "model.decoder",
    "model.reparameterise",
    "model.low_block",
    "model.high_block",
    "model.neuron.kind",
    "model.neuron.bound",
    "model.neuron.tau",
    "model.neuron.v_threshold",
    "model.neuron.surrogate",
    "model.neuron.alpha",
    "optim.lr",
    "optim.weight_decay",
    "optim.decay_norm_and_bias",
    "shortcut.where",
    "shortcut.loss",
    "shortcut.schedule",
    "shortcut.lambda0",
)
"""What the page says of trainings, in this order."""

_ONLY_WITH = {
    "model.gate_gradient": ("model.connection", ("bsg", "bsg_star")),
    "model.neuron.tau": ("model.neuron.kind", ("lif", "plif")),
    "model.neuron.bound": ("model.neuron.kind", ("ilif",)),
    "model.neuron.v_threshold": ("model.neuron.kind", ("if", "lif", "plif")),
    "model.neuron.surrogate": ("model.neuron.kind", ("if", "lif", "plif")),
    "model.neuron.alpha": ("model.neuron.kind", ("if", "lif", "plif")),
    "shortcut.where": ("shortcut.where", ("stage", "block")),
    "shortcut.loss": ("shortcut.where", ("stage", "block")),
    "shortcut.schedule": ("shortcut.where", ("stage", "block")),
    "shortcut.lambda0": ("shortcut.where", ("stage", "block")),
}
"""Fields that mean something only where another one has one of these values in some training."""


def settings_of(one: TableEvidence) -> str:
    """How the rows of a table were trained: what they have in common, and in what they differ."""
    trainings = list(one.distinct.values())
    dumps = [dict(leaves(training.config.dump())) for training in trainings]
    keys = dict.fromkeys(key for dump in dumps for key in dump if key != "train.seed")
    differing = [key for key in keys if len({repr(dump.get(key)) for dump in dumps}) > 1]
    common = []
    for key in _SETTINGS:
        needed, allowed = _ONLY_WITH.get(key, (key, None))
        means = allowed is None or any(dump.get(needed) in allowed for dump in dumps)
        if means and key not in differing and dumps[0].get(key) is not None:
            common.append(f"`{key}={dumps[0][key]}`")
    recipes = ", ".join(dict.fromkeys(f"`{training.config.recipe}`" for training in trainings))
    rows = f"; rows differ in {', '.join(f'`{key}`' for key in differing)}" if differing else ""
    return f"Trained by {recipes} with {', '.join(common)}{rows}."


def scattered(one: TableEvidence) -> Iterator[str]:
    """The values by seed of each row that seeds scatter widely, one line each."""
    for key in dict.fromkeys(judged.claim.column for judged in one.claims):
        column = one.table.columns[key]
        if column.unit != "%":
            continue
        for name, trainings in one.trainings.items():
            values = [
                value * column.factor for each in trainings if (value := value_of(one.table, key, each)) is not None
            ]
            if len(values) > 1 and statistics.stdev(values) > WIDE:
                yield f"* {name}, {column.label} by seed: {', '.join(f'{value:.4g}' for value in values)} %."
