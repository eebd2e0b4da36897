"""A retraining, step by step: reasons, training, gates, alias, report. The same call resumes it after a kill.

One retraining of a model runs at a time, wherever it was started: a lock beside the runs, and a lease in the registry.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from spikefleet import registry
from spikefleet.certificates.drift_reference import REFERENCE, DriftReference
from spikefleet.config.recipes import override_config, parse_config
from spikefleet.config.renamed import with_current_keys
from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.errors import RunError, UserError
from spikefleet.files import write_json
from spikefleet.gates.gate_store import MAKE_ONE
from spikefleet.gates.judging import Verdict
from spikefleet.gates.measuring import Measured
from spikefleet.gates.promoting import promote_through_gates
from spikefleet.registry.lease import Lease, LeaseHeldError, registry_lease
from spikefleet.registry.mlflow_store import connect
from spikefleet.registry.package import WEIGHTS, load_network, read_config
from spikefleet.registry.package_access import package_files
from spikefleet.registry.promotion import Decision
from spikefleet.registry.version import RegisteredModel
from spikefleet.retraining.drift import DriftReport, measure_drift
from spikefleet.retraining.drift_plots import draw_drift
from spikefleet.retraining.plan import Plan, Request, check_plan, plan_of, plan_retraining
from spikefleet.retraining.record import LockedError, Record, RetrainingFolder, Retrainings, Word
from spikefleet.retraining.report import DRIFT, DRIFT_PLOT, write_comparison, write_report
from spikefleet.runs.options import Options
from spikefleet.runs.run_dir import Run
from spikefleet.runs.train_run import FinishedRun, run_training
from spikefleet.status import counting, print_line, waiting
from spikefleet.tracking.mlflow_client import resolve_tracking_uri
from spikefleet.tracking.tracker import Tracker
from spikefleet.training.checkpoints import INITIAL_WEIGHTS
from spikefleet.versions import code_version
from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_pipelines.store.reader import Store

_AGAIN = "the same command completes it"
_FLUSH_S = 30.0
_PARENT_S = 10.0
_INTERRUPTED_FLUSH_S = 3.0


@dataclass(frozen=True)
class Retrained:
    """How a retraining ended."""

    word: Word
    reason: str
    id: str | None = None
    candidate: int | None = None
    report: Path | None = None


def retrain(request: Request, options: Options, console: Console) -> Retrained:
    """Trains a registered model anew if something changed, and promotes the result if it passes the gates.

    Args:
        request: what is asked for.
        options: directories and cluster.
        console: for progress.

    Returns:
        How it ended. A model that is being retrained elsewhere is skipped.

    Raises:
        UserError: an error that the user can fix, before anything starts.
        RunError: the retraining failed; the message says whether the champion has changed.
        Interrupted: SIGINT or SIGTERM; the same call resumes it.
    """
    tracking_uri = resolve_tracking_uri(options.runs_dir)
    retrainings = Retrainings(options.runs_dir)
    with ExitStack() as held:
        with waiting(console, "asking the registry"):
            registry.show(request.model, tracking_uri=tracking_uri)  # no lock for a model that does not exist
        try:
            with waiting(console, f"waiting for other retrainings of {request.model}") as announce:
                began = time.monotonic()
                held.enter_context(retrainings.lock(request.model, request.patience_s))
                left_s = max(0.0, request.patience_s - (time.monotonic() - began))
                label = f"a retraining of {request.model}"
                lease = registry_lease(tracking_uri, request.model, "retraining", label, left_s, announce)
                mine = held.enter_context(lease)
        except LockedError as error:
            return Retrained("skipped", f"model {request.model} is being retrained ({error.holder})")
        except LeaseHeldError as error:
            return Retrained("skipped", f"model {request.model} is being retrained: {error.who}")
        plan = plan_retraining(request, options, console, tracking_uri)
        left = retrainings.promoted_without_report(request.model, plan.champion)
        if left is not None and (record := left.read()) is not None:
            plan = plan_of(record, plan, tracking_uri)
            return _Retraining(plan, options, console, tracking_uri, left, mine).run()
        if not plan.reasons:
            return Retrained("nothing new", f"data, configuration and code are those of version {plan.base.version}")
        if plan.before is not None and not request.force:
            says = f"the same was retrained before: {plan.before.id} {plan.before.word}: {plan.before.reason}"
            return Retrained("nothing new", says, plan.before.id, plan.before.candidate)
        with waiting(console, "checking the configuration against the data") as announce:
            check_plan(plan, options, announce)
        there = retrainings.unfinished(request.model, plan.identity)
        folder = there or retrainings.new(request.model, f"{datetime.now(UTC):%Y%m%d}", plan.identity)
        return _Retraining(plan, options, console, tracking_uri, folder, mine).run()


class _Retraining:
    """One retraining, started or resumed.

    Args:
        plan: of it.
        options: directories and cluster.
        console: for progress.
        tracking_uri: of the registry.
        folder: its directory; a new one, or that of a retraining to resume.
        lease: of the retraining.
    """

    def __init__(
        self,
        plan: Plan,
        options: Options,
        console: Console,
        tracking_uri: str,
        folder: RetrainingFolder,
        lease: Lease,
    ) -> None:
        self._plan, self._options, self._console, self._uri = plan, options, console, tracking_uri
        self._folder, self._lease = folder, lease
        fresh = Record(
            id=folder.id,
            model=plan.request.model,
            identity=plan.identity,
            champion=plan.champion,
            base=plan.base.version,
            reasons=list(plan.reasons),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        held = folder.read()
        self._resumed = held is not None
        self._record = held or fresh
        if not self._record.is_decided:
            self._record = self._record.model_copy(update={"word": None, "reason": None})

    def run(self) -> Retrained:
        """All steps that are not done yet."""
        self._note()
        what = "resuming" if self._resumed else "starting"
        print_line(self._console, f"{what} retraining {self._folder.id}: {'; '.join(self._record.reasons)}")
        config = self._plan.config
        experiment = config.tracking.experiment or config.recipe
        tracker = Tracker.open(self._folder.path, self._folder.id, experiment, self._uri)
        tracker.set_tags(
            {
                "kind": "retraining",
                "model": self._record.model,
                "because": "; ".join(self._record.reasons),
                "failure": "",
            }
        )
        try:
            tracker.flush(_PARENT_S)
            if not self._record.is_decided:
                self._train(tracker.run_id)
                word, reason = self._promote()
                self._note(word=word, reason=reason)
            report = self._report(tracker)
        except KeyboardInterrupt:
            tracker.finish("KILLED", wait_s=_INTERRUPTED_FLUSH_S)
            raise
        except Exception as error:
            sentence = self._failure(error)
            if not self._record.is_decided:
                with suppress(OSError):  # a full disk may be the reason
                    self._note(word="failed", reason=str(error))
            tracker.set_tags({"failure": str(error)})
            tracker.finish("FAILED", wait_s=_FLUSH_S)
            if isinstance(error, UserError | RunError | SourceError | StoreError):
                raise RunError(sentence) from error
            raise
        with waiting(self._console, "delivering records to MLflow"):
            tracker.finish("FINISHED", wait_s=_FLUSH_S)
        self._note(reported=True)
        outcome = self._record
        assert outcome.word is not None, "it was decided"
        return Retrained(outcome.word, outcome.reason or "", self._folder.id, outcome.candidate, report)

    def _failure(self, error: Exception) -> str:
        """What an error leaves, in words."""
        record, begin = self._record, f"retraining {self._folder.id}"
        if record.is_decided:
            return f"{begin} has {record.word} version {record.candidate}, but has no report: {error}; {_AGAIN}"
        champion: int | None = None
        if record.verdict is not None:
            with suppress(UserError):
                champion = _champion_of(registry.show(record.model, tracking_uri=self._uri))
        if record.has_promoted(champion):
            return f"{begin} failed when version {champion} was champion already: {error}; {_AGAIN}"
        kept = "no alias was changed" if record.candidate is None else "the champion was not changed"
        return f"{begin} failed, and {kept}: {error}"

    def _note(self, **fields: Any) -> None:
        self._record = self._folder.write(self._record.model_copy(update=fields))

    def _train(self, parent: str | None) -> None:
        """Trains the seeds that are not trained yet, then registers the best one as challenger."""
        if self._record.candidate is not None:
            return
        config = self._plan.config
        seeds = range(config.train.seed, config.train.seed + config.retrain.seeds)
        options = replace(self._options, promote=False, parent_run=parent)
        for position, seed in enumerate(seeds):
            if position < len(self._record.runs):
                continue
            if len(seeds) > 1:
                print_line(self._console, f"seed {seed}: training {position + 1} of {len(seeds)}")
            done = self._train_seed(seed, options, register=len(seeds) == 1)
            score = done.validation.get(config.checkpoint.metric)
            self._note(runs=[*self._record.runs, done.run.name], scores=[*self._record.scores, score])
        best = _best(self._record.scores, config.checkpoint.mode)
        run = Run(self._options.runs_dir.resolve() / self._record.runs[best])
        if len(seeds) > 1:
            self._train_seed(seeds[best], options, register=True)
        _, _, version = str(run.record()["registered"]).rpartition("/")
        self._note(candidate=int(version))

    def _train_seed(self, seed: int, options: Options, *, register: bool) -> FinishedRun:
        name = self._run_name(seed)
        if self._plan.config.train.initial_weights is not None:
            self._copy_weights(Run(options.runs_dir.resolve() / name).path)
        overrides = {"train.seed": seed, "registry.register_best": register}
        config = override_config(self._plan.config, overrides, origin=f"retraining {self._folder.id}")
        return run_training(config, options, self._console, name)

    def _run_name(self, seed: int) -> str:
        """Name of a training: that of an earlier retraining with the same training, if there is one."""
        config, hashed = self._plan.config, hashlib.sha256()
        for part in (self._record.model, config.digest(), self._plan.store.manifest.content_hash, code_version()):
            hashed.update(part.encode())
        digest, day = hashed.hexdigest()[:8], self._folder.id.rpartition("-retrain-")[2][:8]
        stem = self._record.model[:60]
        there = sorted(self._options.runs_dir.resolve().glob(f"{stem}-retrain-*-{digest}-s{seed}"))
        return there[0].name if there else f"{stem}-retrain-{day}-{digest}-s{seed}"

    def _copy_weights(self, folder: Path) -> None:
        target = folder / INITIAL_WEIGHTS
        if target.is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        with package_files(self._plan.base.uri, self._uri) as (directory, _):
            partial = target.with_suffix(".part")
            shutil.copyfile(directory / WEIGHTS, partial)
            partial.replace(target)

    def _promote(self) -> tuple[Word, str]:
        """Compares the candidate with the champion, and moves the alias if all gates pass."""
        candidate, settings, model = self._record.candidate, self._plan.config.retrain, self._record.model
        assert candidate is not None, "it was registered"
        with connect(self._uri):
            self._lease.check()
        if self._is_promoted():
            assert self._record.verdict is not None, "its gates passed"
            return "promoted", str(self._record.verdict["reason"])
        if settings.gate_store is None:
            reason = f"there is no gate store, so version {candidate} is challenger and nothing is promoted: {MAKE_ONE}"
            with waiting(self._console, "keeping the candidate as challenger") as announce:
                registry.keep_as_challenger(
                    model, candidate, reason, retraining=self._folder.id, tracking_uri=self._uri, announce=announce
                )
            return "kept", reason
        with counting(self._console, "comparing with the champion") as progress:
            gated = promote_through_gates(
                model,
                candidate,
                settings,
                self._options.stores_dir,
                self._uri,
                used=self._plan.store,
                gpu=self._plan.config.cluster.gpu,
                retraining=self._folder.id,
                judged=self._judged,
                progress=progress,
            )
        return ("promoted" if gated.promotion.alias == "champion" else "kept"), gated.promotion.reason

    def _is_promoted(self) -> bool:
        """Whether the candidate was made champion before a kill; what followed that is then done now."""
        record, model = self._record, self._record.model
        if not record.has_promoted(_champion_of(registry.show(model, tracking_uri=self._uri))):
            return False
        assert record.candidate is not None
        assert record.verdict is not None
        reason = str(record.verdict["reason"])

        def still(now: RegisteredModel) -> Decision | None:
            return Decision("champion", reason) if record.has_promoted(_champion_of(now)) else None

        label = self._folder.id
        done = registry.settle(model, record.candidate, still, retraining=label, tracking_uri=self._uri)
        return done is not None

    def _judged(self, verdict: Verdict, candidate: Measured, champion: Measured | None) -> None:
        write_comparison(self._folder.path / "report", verdict, candidate, champion)
        self._note(verdict=json.loads(json.dumps(verdict.to_json())))

    def _report(self, tracker: Tracker) -> Path:
        folder = self._folder.path / "report"
        folder.mkdir(parents=True, exist_ok=True)
        drift = self._drift(folder)
        report = write_report(folder, self._record, drift)
        tracker.describe(report.read_text(encoding="utf-8"))
        candidate = self._record.candidate
        tracker.set_tags({"outcome": self._record.word, "reason": self._record.reason, "candidate": candidate})
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                inside = path.parent.relative_to(folder)
                tracker.log_artifact(path, str(Path("report") / inside))
        return report

    def _drift(self, folder: Path) -> DriftReport | None:
        """The new data against the champion's, unless they are the same."""
        base, store = self._plan.base, self._plan.store
        if base.tags.get("data_hash") == store.manifest.content_hash:
            return None
        with counting(self._console, "comparing the data with the champion's") as progress:
            with package_files(base.uri, self._uri) as (directory, content_hash):
                network, _ = load_network(directory, content_hash)
                config = parse_config(with_current_keys(read_config(directory)), origin=base.uri)
                held = DriftReference.read(directory) if (directory / REFERENCE).is_file() else None
                summary = DataSummary.read(directory)
            before = _store_of(summary.content_hash, config, self._options.stores_dir)
            report = measure_drift(before or held or summary, store, "train", network, config, progress=progress)
        write_json(folder / DRIFT, report.to_json())
        draw_drift(report, folder / DRIFT_PLOT)
        return report


def _champion_of(model: RegisteredModel) -> int | None:
    return None if model.champion is None else model.champion.version


def _best(scores: list[float | None], mode: str) -> int:
    """Position of the best score; the first one where nothing was validated."""
    known = [(score, position) for position, score in enumerate(scores) if score is not None]
    if not known:
        return 0
    sign = 1 if mode == "max" else -1
    return max(known, key=lambda pair: (sign * pair[0], -pair[1]))[1]


def _store_of(content_hash: str, config: Config, stores_dir: Path) -> Store | None:
    """A store with this content, where the champion's configuration or the stores directory has one."""
    named: list[str | Path] = [] if config.data.store is None else [config.data.store]
    beside = sorted(path.parent for path in stores_dir.glob("*/manifest.json"))
    for place in (*named, *beside):
        with suppress(StoreError, OSError):
            store = Store.open(place, verify=False)
            if store.manifest.content_hash == content_hash:
                return store
    return None
