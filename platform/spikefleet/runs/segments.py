"""The segments of a run: what a finished run keeps of its record, config and report when it is trained further."""

from __future__ import annotations

import shutil
from typing import Any

from spikefleet.config.recipes import override_config
from spikefleet.config.renamed import with_current_keys
from spikefleet.config.schema import Config, differing_fields
from spikefleet.config.train_config import may_differ_by_segment
from spikefleet.errors import UserError
from spikefleet.files import read_json_object, write_json
from spikefleet.runs.run_dir import Run
from spikefleet.training.loop import Outcome
from spikefleet_tune.messages import counted

_OF_A_SEGMENT = ("validation", "test", "last", "registered", "ended", "progress")


def is_complete(run: Run, config: Config) -> bool:
    """Whether nothing is left to train of a run: it is finished, and no larger `train.max_minutes` is given now.

    Args:
        run: the run, which may not exist yet.
        config: that it would be resumed with.
    """
    record = run.record()
    if record.get("status") != "finished" or extends(run, config):
        return False
    before, now = (record.get("ended") or {}).get("max_minutes"), config.train.max_minutes
    return before is None or (now is not None and now <= before)


def extends(run: Run, config: Config) -> bool:
    """Whether a configuration has a segment that the run has not started."""
    segment = config.train.segment
    return segment is not None and run.exists and run.config().train.segment != segment


def extended(run: Run, config: Config, epochs: int) -> Config:
    """The configuration of a further segment, whose schedules start anew at the run's latest checkpoint.

    The same extension of a run that has started it and has not finished it resumes it.

    Args:
        run: an existing run.
        config: its configuration, maybe with another schedule.
        epochs: to train beyond those that the run has started.

    Raises:
        UserError: fewer than one epoch, the run has no checkpoint, or more than the schedule differs.
    """
    if epochs < 1:
        raise UserError(f"--extend-epochs is {epochs}; set it to 1 or more epochs")
    held, state = run.config(), run.checkpoints.newest_state()
    if state is None:
        raise UserError(f"run {run.name} has no checkpoint yet, so nothing can be extended; leave --extend-epochs out")
    changed = differing_fields(held.dump(), config.dump())
    if others := [f"{path}={now}" for path, (_, now) in changed.items() if not may_differ_by_segment(path)]:
        raise UserError(
            f"run {run.name} cannot be extended with {', '.join(others)}: only the schedule may change, such as "
            "optim.lr; use the run's values, or start another run with init.from"
        )
    if "train.epochs" in changed:
        raise UserError(
            f"--extend-epochs {epochs} and train.epochs={config.train.epochs} are two lengths; leave train.epochs out"
        )
    last = held.train.segment
    if last is not None and not changed and run.record().get("status") != "finished":
        started = last.from_epoch + (last.from_step % state.steps_per_epoch > 0)
        if held.train.epochs - started == epochs:
            return held
    if late := [milestone for milestone in config.optim.milestones if milestone >= epochs]:
        raise UserError(
            f"optim.milestones={late} are beyond the {counted(epochs, 'epoch')} of the segment, in which they are "
            "counted anew; set optim.milestones, or optim.schedule=constant"
        )
    started = state.epoch + (state.step_in_epoch > 0)
    step = state.epoch * state.steps_per_epoch + state.step_in_epoch
    overrides = {
        "train.epochs": started + epochs,
        "train.segment": {"from_step": step, "from_epoch": state.epoch},
    }
    return override_config(config, overrides, origin=f"run {run.name}")


def schedule_of(config: Config) -> str:
    """The sentence that states the schedule of the latest segment."""
    optim, segment = config.optim, config.train.segment
    first = 1 if segment is None else segment.from_epoch + 1
    how = {
        "constant": "constant",
        "step": f"times {optim.gamma:g} after {', '.join(map(str, optim.milestones))} epochs of it",
    }.get(optim.schedule, f"{optim.schedule} to {optim.final_factor:g} times that")
    warm = f", after a warm-up of {optim.warmup_epochs:g} epochs" if optim.warmup_epochs else ""
    return f"epochs {first} to {config.train.epochs}: learning rate {optim.lr:g}, {how}{warm}"


def begin_extension(run: Run, config: Config) -> None:
    """Begins the segment that `extended` has planned; the run is locked by this process.

    Raises:
        UserError: the run was trained since then.
    """
    state, segment = run.checkpoints.newest_state(), config.train.segment
    assert segment is not None, "`extended` sets it"
    step = None if state is None else state.epoch * state.steps_per_epoch + state.step_in_epoch
    if step != segment.from_step:
        raise UserError(
            f"run {run.name} was trained to step {step} meanwhile, and its extension was planned from step "
            f"{segment.from_step}; run the command again"
        )
    begin_segment(run, config)


def segments_of(run: Run) -> str:
    """The earlier segments of a run and the present one, for its tags; empty for a run of one segment."""
    configs = sorted(run.path.glob("config-*.json"), key=lambda path: int(path.stem.rpartition("-")[2]))
    if not configs:
        return ""
    earlier = [run.parse(with_current_keys(read_json_object(path)), origin=f"run {run.name}") for path in configs]
    schedules = dict.fromkeys(schedule_of(config) for config in (*earlier, run.config()))
    return "; ".join(schedules) if len(schedules) > 1 else ""  # a longer train.max_minutes leaves it as it was


def end_of(outcome: Outcome, config: Config) -> dict[str, Any] | None:
    """The field `ended` of a run's record: why it ended before its last epoch; None where it did not."""
    if outcome.ended is None:
        return None
    ended = {"why": outcome.ended.why, "max_minutes": outcome.ended.max_minutes}
    return {**ended, "epoch": len(outcome.history), "epochs": config.train.epochs}


def begin_segment(run: Run, config: Config) -> None:
    """Prepares a run to be trained further.

    Its metrics, its configuration and its report so far are kept as `segments` of run.json, `config-1.json` and
    `report-1`, with the number of the segment.

    Args:
        run: that has started; locked by this process.
        config: of the new segment.
    """
    record = run.record()
    segments = [*record.get("segments", ())]
    number = len(segments) + 1
    state = run.checkpoints.newest_state()
    before = read_json_object(run.path / "config.json")
    kept = {key: record[key] for key in _OF_A_SEGMENT if record.get(key) is not None}
    best = None if state is None or state.best is None else state.best.step
    segments.append({**kept, "config": f"config-{number}.json", "best_step": best})
    write_json(run.path / f"config-{number}.json", before)
    if (run.path / "report").is_dir():
        shutil.copytree(run.path / "report", run.path / f"report-{number}", dirs_exist_ok=True)
    # The record first: a run that is killed between both is unfinished, and not finished with a segment never trained.
    run.note(status="created", segments=segments, **dict.fromkeys(_OF_A_SEGMENT))
    write_json(run.path / "config.json", config.dump())


def registered_before(run: Run) -> str | None:
    """The version that an earlier segment registered, where no later checkpoint is better; None otherwise."""
    segments = run.record().get("segments") or ()
    state = run.checkpoints.newest_state()
    if not segments or state is None or state.best is None:
        return None
    last: dict[str, Any] = next((one for one in reversed(segments) if one.get("registered")), {})
    return last.get("registered") if last.get("best_step") == state.best.step else None
