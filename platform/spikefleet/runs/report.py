"""The report of a run, made again where a part of it that registration needs is missing."""

from __future__ import annotations

from pathlib import Path

import torch

from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.files import read_json_object
from spikefleet.status import Announce
from spikefleet.tasks import build_task
from spikefleet.tasks.per_image import save_per_image
from spikefleet.tasks.task import EVALUATION
from spikefleet.training.checkpoints import best_network, load_checkpoint
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.evaluation import evaluate
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.store.reader import Store


def complete_report(config: Config, checkpoint: Path, report: Path, store: Store, announce: Announce) -> Path:
    """Evaluates the best checkpoint of a run on the reported split again, unless the whole evaluation is there.

    Args:
        config: of the run.
        checkpoint: directory of its best checkpoint.
        report: directory of its report.
        store: its data.
        announce: called with what begins.

    Returns:
        The file of the evaluation.

    Raises:
        UserError: the checkpoint is damaged.
    """
    try:
        read_json_object(report / EVALUATION, "metrics", "samples")
    except UserError:  # missing, or not the file that was written
        announce("testing again")
        task = build_task(config, DataSummary.of(store.manifest))
        network = best_network(load_checkpoint(checkpoint), config.model)
        loader = BatchLoader(store.samples(store.manifest.original("test")), config.transform, train=False)
        group = ProcessGroup(0, 1, torch.device("cpu"))
        evaluation = evaluate(network, task, loader, config.train, group, over_time=True)
        assert evaluation is not None, "rank 0 gets the predictions"
        details = evaluation.details(task)
        found = evaluation.predictions, evaluation.targets
        if (reason := save_per_image(task, *found, loader.split, report)) is not None:
            announce(reason)
        task.report.write(details, *found, report)
    return report / EVALUATION
