"""The gates of a candidate, each passed and failed, on answers and on boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from spikefleet.config.retrain_config import RetrainConfig
from spikefleet.data_summary import DataSummary
from spikefleet.gates.judging import Gate, Verdict, decision_of, judge, uncompared
from spikefleet.gates.measuring import Measured
from spikefleet.registry.version import CONTENT_HASH, RegisteredVersion
from spikefleet.tasks.coco_metrics import FoundBoxes
from spikefleet.tasks.per_image import Answers, Boxes
from spikefleet_pipelines.store.annotations import Annotations, Moment

SETTINGS = RetrainConfig()
DATA = DataSummary("s", "d" * 64, tuple("abcde"), (1, 2, 3, 4, 5))


def version(number: int, **tags: str) -> RegisteredVersion:
    given = {"spike_driven": "proved", CONTENT_HASH: "c" * 64, **tags}
    return RegisteredVersion("m", number, "r", datetime.now(UTC), given, {})


def measured(number: int, results: Any, energy_mj: float = 1.0, **tags: str) -> Measured:
    """A version with given results; networks and evaluations are not looked at."""
    count = len(results.target) if isinstance(results, Answers) else len(results.targets)
    evaluation: Any = SimpleNamespace(predictions=[None] * count, targets=[None] * count)
    config: Any = SimpleNamespace(task="classification")
    nothing = cast(Any, None)
    one = Measured(version(number, **tags), config, DATA, nothing, nothing, nothing, evaluation, results, {})
    one.__dict__["energy_mj"] = energy_mj  # as if it had been measured
    return one


def answers(right: Sequence[bool], classes: Sequence[int] | None = None) -> Answers:
    target = np.array(classes if classes is not None else np.arange(len(right)) % 5, np.int32)
    predicted = np.where(np.array(right), target, (target + 1) % 5).astype(np.int32)
    return Answers(predicted, target, np.ones(len(right), np.float32))


def paired(both: int, gained: int, lost: int, neither: int = 0) -> tuple[Answers, Answers]:
    """Candidate and champion with these counts, spread over the classes."""
    counts = (both, gained, lost, neither)
    ours = np.repeat([True, True, False, False], counts)
    theirs = np.repeat([True, False, True, False], counts)
    return answers(ours.tolist()), answers(theirs.tolist())


def verdict_of(candidate: Measured, champion: Measured, settings: RetrainConfig = SETTINGS, **how: Any) -> Verdict:
    return judge(candidate, champion, settings, **({"gate_store": "g" * 64, "comparisons": 1} | how))


def gate(verdict: Verdict, name: str) -> Gate:
    return next(one for one in verdict.gates if one.name == name)


def test_a_candidate_that_is_better_by_more_than_chance_passes_all_gates() -> None:
    ours, theirs = paired(both=900, gained=60, lost=20, neither=20)
    verdict = verdict_of(measured(2, ours), measured(1, theirs))
    assert [one.name for one in verdict.gates] == ["proof and flaws", "content hash", "better", "classes", "energy"]
    assert verdict.passed
    assert verdict.reason == (
        "version 2 is better (top-1 96.00% against 92.00% on 1,000 gate images; 60 right by it alone, 20 by the "
        "champion alone; gain +4.00%, p = 4.3e-06, limit 0.05, exact McNemar test)"
    )
    assert decision_of(verdict, version(2)).alias == "champion"
    low, high = verdict.interval or (0, 0)
    assert 0 < low < 0.04 < high


@pytest.mark.parametrize(
    ("gained", "lost", "says"),
    [
        (20, 20, "version 2 is not better (top-1"),
        (10, 60, "version 2 is not better (top-1"),
        (26, 20, "version 2 is not shown to be better: such a gain may be chance"),
    ],
)
def test_a_candidate_that_is_only_as_good_is_kept_as_challenger(gained: int, lost: int, says: str) -> None:
    ours, theirs = paired(900, gained, lost)
    verdict = verdict_of(measured(2, ours), measured(1, theirs))
    assert not verdict.passed
    assert verdict.reason.startswith(says)
    assert decision_of(verdict, version(2)).alias == "challenger"


def test_a_gain_below_the_margin_is_not_enough_though_it_is_no_chance() -> None:
    ours, theirs = paired(99_900, 90, 10)
    verdict = verdict_of(measured(2, ours), measured(1, theirs))
    assert verdict.reason.startswith("version 2 gains less than retrain.margin=0.20%")
    assert verdict_of(measured(2, ours), measured(1, theirs), RetrainConfig(margin=0.0005)).passed


def test_energy_may_exceed_the_champions_by_the_slack() -> None:
    ours, theirs = paired(900, 60, 20)
    assert verdict_of(measured(2, ours, 1.09), measured(1, theirs)).passed
    verdict = verdict_of(measured(2, ours, 1.11), measured(1, theirs))
    assert not verdict.passed
    assert verdict.reason == (
        "energy 1.11 mJ per image is above the limit of 1.1 mJ (champion 1 mJ, retrain.energy_slack=0.1)"
    )


def test_a_class_that_becomes_much_worse_keeps_the_candidate_back() -> None:
    classes = np.repeat(np.arange(5), 200)
    theirs = np.ones(1000, bool)
    theirs[200:400] = False  # class b is never right: the candidate gains 200 there
    ours = np.ones(1000, bool)
    ours[:30] = False  # and loses 30 of 200 of class a
    pair = (
        measured(2, answers(ours.tolist(), classes.tolist())),
        measured(1, answers(theirs.tolist(), classes.tolist())),
    )
    verdict = verdict_of(*pair)
    assert gate(verdict, "better").passed
    assert not verdict.passed
    assert verdict.reason == "1 class worse by more than 5% and more than chance: a by 15.0%"
    assert verdict_of(*pair, RetrainConfig(class_drop=0.2)).passed
    few = np.ones(1000, bool)
    few[:2] = False  # 2 of 4 images of a class: no more than chance
    rare = np.concatenate([np.zeros(4, int), np.repeat(np.arange(1, 5), 249)])
    few_theirs = np.ones(1000, bool)
    few_theirs[10:80] = False
    rare_pair = (
        measured(2, answers(few.tolist(), rare.tolist())),
        measured(1, answers(few_theirs.tolist(), rare.tolist())),
    )
    assert gate(verdict_of(*rare_pair), "classes").passed


@pytest.mark.parametrize(
    ("tags", "says", "alias"),
    [
        ({"spike_driven": "refuted"}, "the binary form of version 2 differs from it", "challenger"),
        ({"spike_driven": "not shown"}, "the spike check of version 2 shows nothing", None),
        ({"flaw": "it is silent"}, "version 2 must not be used: it is silent", None),
        ({"rolled_back": "reads 7 as 1"}, "version 2 was rolled back: reads 7 as 1", "challenger"),
    ],
)
def test_a_better_network_without_proof_or_with_a_flaw_is_not_promoted(
    tags: dict[str, str], says: str, alias: str | None
) -> None:
    ours, theirs = paired(900, 60, 20)
    verdict = verdict_of(measured(2, ours, **tags), measured(1, theirs))
    assert not verdict.passed
    assert says in verdict.reason
    assert decision_of(verdict, version(2, **tags)).alias == alias
    first = uncompared(version(2, **tags), 1000, "g" * 64)
    assert not first.passed


def test_the_first_champion_needs_no_comparison() -> None:
    verdict = uncompared(version(1), 1000, "g" * 64)
    assert verdict.passed
    assert verdict.reason == "version 1 is the first champion"
    again = uncompared(replace(version(1), aliases=("champion",)), 1000, "g" * 64)
    assert again.reason == "version 1 is already the champion"


def test_a_guard_divides_the_level_by_the_comparisons_and_many_of_them_are_a_warning() -> None:
    ours, theirs = paired(900, 34, 20)
    pair = measured(2, ours), measured(1, theirs)
    assert gate(verdict_of(*pair, comparisons=60), "better").passed
    guarded = verdict_of(*pair, RetrainConfig(guard=True), comparisons=60)
    assert not guarded.passed
    assert guarded.alpha == pytest.approx(0.05 / 60)
    assert any("60 comparisons were made on these gate images" in warning for warning in guarded.warnings)
    assert not any("comparisons were made" in warning for warning in verdict_of(*pair, comparisons=49).warnings)


def test_too_small_a_gate_store_is_a_warning_with_the_gain_that_it_can_see() -> None:
    ours, theirs = paired(130, 8, 5)
    verdict = verdict_of(measured(2, ours), measured(1, theirs))
    assert verdict.detectable_gain == pytest.approx(2.5 * np.sqrt(13) / 143)
    assert verdict.warnings[0].startswith("143 gate images can show a gain of 6.30% about four times in five")
    ours, theirs = paired(10_000_000, 300, 5)
    assert verdict_of(measured(2, ours), measured(1, theirs)).warnings == ()


def boxes(miss: Sequence[bool], labels: Sequence[int]) -> Boxes:
    """A detector that finds the one object of each image, except where it misses."""
    targets, found = [], []
    for k, label in enumerate(labels):
        box = np.array([[10.0, 10.0, 20.0, 20.0]])
        one = np.array([label])
        targets.append(
            Annotations(
                k,
                64,
                64,
                boxes=box,
                category_ids=one + 1,
                labels=one,
                crowd=np.array([False]),
                areas=np.array([400.0]),
                ids=np.array([k + 1]),
            )
        )
        corners = np.zeros((0, 4)) if miss[k] else np.array([[10.0, 10.0, 30.0, 30.0]])
        found.append(FoundBoxes(corners, np.full(len(corners), 0.9), np.full(len(corners), label)))
    return Boxes(found, targets)


def test_detectors_are_compared_by_resampled_images() -> None:
    labels = [k % 5 for k in range(100)]
    good = measured(2, boxes([k < 5 for k in range(100)], labels))
    bad = measured(1, boxes([k < 40 for k in range(100)], labels))
    settings = RetrainConfig(resamples=300)
    better = verdict_of(good, bad, settings)
    assert better.passed
    assert "version 2 is better (mAP50-95 94.06% against 60.40%" in better.reason
    assert "paired bootstrap, 300 resamples" in better.reason
    low, high = better.interval or (0, 0)
    assert 0.2 < low < 0.35 < high < 0.5
    worse = verdict_of(bad, good, settings)
    assert not worse.passed
    assert worse.reason.startswith("version 1 is not better (mAP50-95")
    assert "; 5 classes worse by more than 5% and more than chance" in worse.reason
    same = verdict_of(good, good, settings)
    assert not same.passed
    assert "is not better" in same.reason


def of_recordings(plain: Boxes, label_times: int) -> Boxes:
    """The same images as label times of recordings."""
    moments = [Moment(k // label_times, 50_000 * (k % label_times + 1), 0) for k in range(len(plain.targets))]
    targets = [target._replace(moment=moment) for target, moment in zip(plain.targets, moments, strict=True)]
    return Boxes(plain.found, targets)


def test_detectors_of_events_are_compared_by_resampled_recordings() -> None:
    """A gain in two of five recordings is less sure than one in 40 of 100 images."""
    labels = [k % 5 for k in range(100)]
    pair = [boxes([k < missed for k in range(100)], labels) for missed in (0, 40)]
    settings, widths = RetrainConfig(resamples=300), []
    for good, bad in (pair, [of_recordings(one, 20) for one in pair]):
        verdict = verdict_of(measured(2, good), measured(1, bad), settings)
        low, high = verdict.interval or (0, 0)
        widths.append(high - low)
    assert "paired bootstrap of recordings, 300 resamples" in verdict.reason
    assert widths[1] > 2 * widths[0]


def test_a_guarded_comparison_of_detectors_draws_enough_resamples_to_pass() -> None:
    labels = [k % 5 for k in range(100)]
    good = measured(2, boxes([False] * 100, labels))
    bad = measured(1, boxes([k % 2 == 0 for k in range(100)], labels))
    verdict = verdict_of(good, bad, RetrainConfig(resamples=200, guard=True), comparisons=10)
    assert gate(verdict, "better").passed, "1 / 201 is above alpha / 10"
    assert "paired bootstrap, 2,000 resamples" in verdict.reason


@pytest.mark.parametrize(("label_times", "shown"), [(100, False), (25, False), (5, True)])
def test_few_recordings_show_no_gain_however_many_label_times_they_have(label_times: int, shown: bool) -> None:
    """1 and 4 recordings of 100 label times cannot have p below 1/2 and 1/16, 20 can."""
    labels, missed = [k % 5 for k in range(100)], [k % 5 < 2 for k in range(100)]
    good, bad = (of_recordings(boxes(miss, labels), label_times) for miss in ([False] * 100, missed))
    settings = RetrainConfig(resamples=300)
    verdict = verdict_of(measured(2, good), measured(1, bad), settings)
    assert gate(verdict, "better").passed is shown
    assert any("make a gate store with more recordings" in one for one in verdict.warnings) is not shown
    turned = verdict_of(measured(2, bad), measured(1, good), settings)
    assert gate(turned, "classes").passed is not shown, "a class is worse by more than chance"
