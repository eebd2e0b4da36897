"""The papers' claims as data, and the verdict on each from results over seeds."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np
import pytest

from spikefleet.errors import UserError
from spikefleet.gates.paired import holm
from spikefleet.reproduction.claim import (
    Claim,
    ComparedRows,
    entry_of,
    list_claimed,
    load_claims,
    paper_difference,
    parse_claims,
)
from spikefleet.reproduction.table import list_tables, load_table
from spikefleet.reproduction.verdict import JudgedClaim, judge


@pytest.mark.parametrize("name", list_claimed())
def test_claims_are_of_the_papers_values(name: str) -> None:
    """`parse_claims` refuses a direction that the paper's own values contradict."""
    table = load_table(name)
    claims = load_claims(table)
    assert claims
    for claim in claims:
        for pair in claim.pairs:
            assert (paper_difference(claim, pair, table) is None) == (claim.source == "project")
            assert entry_of(table, pair.first) != entry_of(table, pair.second)


def test_tables_of_measured_effects_have_claims() -> None:
    assert set(list_claimed()) <= set(list_tables())
    for name in set(list_tables()) - set(list_claimed()):
        assert load_table(name).not_judged
    assert set(list_claimed()) >= {"sg_resnet_table7", "sg_resnet_table8", "shortcut_table1", "spike_yolo_table4"}
    assert load_claims(load_table("spike_yolo_table1")) == ()
    (asd,) = load_claims(load_table("sg_resnet_table6"))
    table = load_table("sg_resnet_table6")
    assert [paper_difference(asd, pair, table) for pair in asd.pairs] == pytest.approx([0.51, 0.24, 0.63])


VALID = """
claims:
  - name: gate
    says: The gate trains
    column: test/top1
    pairs: [{first: SG ResNet34, second: Spiking ResNet34, at: 34 layers}]
"""


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("SG ResNet34", "SG ResNet35", "0 rows of the name 'SG ResNet35', expected one of CIFAR-100: SG ResNet10"),
        ("test/top1", "test/top2", "compares 'test/top2', expected one of test/top1"),
        (
            "says: The gate trains",
            "direction: less\n    says: x",
            r"claims less, but the paper's values differ by \+42.96",
        ),
        ("pairs:", "pair:", "pair"),
        ("says: The gate trains", "source: project\n    says: x", "compares values of the paper; its source is paper"),
        ("name: gate", "name: gate\n    direction: equal", "direction"),
    ],
)
def test_a_claim_that_the_table_does_not_bear_out_is_refused(old: str, new: str, part: str) -> None:
    table = load_table("sg_resnet_table7")
    (claim,) = parse_claims(VALID, table)
    assert (claim.name, claim.sign) == ("gate", 1)
    with pytest.raises(UserError, match=part):
        parse_claims(VALID.replace(old, new), table)


def test_a_claim_that_is_there_twice_is_refused() -> None:
    twice = VALID + VALID.split("claims:\n")[1]
    with pytest.raises(UserError, match="claim gate is there twice"):
        parse_claims(twice, load_table("sg_resnet_table7"))


def claim(*names: str, name: str = "claim", direction: str = "greater") -> Claim:
    """A claim that row `a<name>` is greater than `b<name>`."""
    rows = tuple(ComparedRows(first=f"a{one}", second=f"b{one}", at=one) for one in names)
    return Claim.model_validate({"name": name, "says": "", "column": "top1", "direction": direction, "pairs": rows})


def seeds(mean: float, spread: float = 1.0, first: int = 0) -> dict[Hashable, float]:
    """Results with a mean and a standard deviation of exactly these values; not those of another `first`."""
    values = np.random.default_rng(first).normal(size=5)
    values = (values - values.mean()) / values.std(ddof=1)
    return {seed: mean + spread * float(value) for seed, value in enumerate(values)}


def verdict(results: Mapping[str, Mapping[Hashable, float]], *claims: Claim) -> JudgedClaim:
    """The verdict on the first claim."""
    return judge(claims, {"top1": results}, {})[0]


def test_verdicts() -> None:
    clear = {"a10": seeds(95), "b10": seeds(90, 1.1, first=1), "a18": seeds(97), "b18": seeds(90, 1.1, first=1)}
    noise = {"a10": seeds(90), "b10": seeds(90.3, first=1), "a18": seeds(90), "b18": seeds(90.2, first=1)}
    both = claim("10", "18")
    assert verdict(clear, both).verdict == "holds"
    assert verdict(noise, both).verdict == "not shown at this scale"
    assert verdict(clear, claim("10", "18", direction="less")).verdict == "contradicted"
    assert verdict({}, both).verdict == "not run yet"
    mixed = {**clear, "a18": noise["a18"], "b18": noise["b18"]}
    assert verdict(mixed, both).verdict == "holds in part"
    assert [pair.found for pair in verdict(mixed, both).pairs] == ["shown", "open"]
    reversed_ = {**clear, "a18": clear["b18"], "b18": clear["a18"]}
    assert verdict(reversed_, both).verdict == "holds in part"
    assert [pair.found for pair in verdict(reversed_, both).pairs] == ["shown", "reversed"]
    assert verdict({**noise, "a18": clear["b18"], "b18": clear["a18"]}, both).verdict == "contradicted in part"
    assert verdict({"a18": clear["b18"], "b18": clear["a18"]}, both).verdict == "contradicted in part"


def test_a_claim_holds_only_where_it_was_run() -> None:
    clear = {"a10": seeds(95), "b10": seeds(90, 1.1, first=1), "a18": {0: 97.0}, "b18": {0: 90.0, 1: 91.0}}
    found = verdict(clear, claim("10", "18"))
    assert [pair.found for pair in found.pairs] == ["shown", "not run"]
    assert found.verdict == "holds in part"
    assert found.pairs[1].ours is not None
    assert found.pairs[1].adjusted_p is None


def test_comparisons_that_were_not_run_count_for_the_adjustment() -> None:
    clear = {"a10": seeds(95), "b10": seeds(90, 1.1, first=1)}
    (alone,), (among, missing) = verdict(clear, claim("10")).pairs, verdict(clear, claim("10", "18")).pairs
    assert alone.adjusted_p is not None
    assert among.adjusted_p == pytest.approx(2 * alone.adjusted_p)
    assert (missing.found, missing.adjusted_p) == ("not run", None)


def test_p_values_are_adjusted_over_the_whole_table() -> None:
    """What is shown alone need not be among several; a pair that two claims share is one test."""
    border = {"a": {0: 1.0, 1: 1.8, 2: 0.9, 3: 2.6, 4: 0.5}, "b": dict.fromkeys(range(5), 0.0)}
    border["b"][0] = 0.01
    one = {f"{name}{row}": values for name, values in border.items() for row in ("1", "2", "3", "4")}
    alone = verdict(one, claim("1"))
    p = alone.pairs[0].ours.p_value
    assert 0.0125 < p < 0.05
    assert alone.verdict == "holds"
    among = verdict(one, claim("1"), claim("2", "3", "4", name="others"))
    assert [pair.adjusted_p for pair in among.pairs] == [pytest.approx(holm([p] * 4)[0])]
    assert among.verdict == "not shown at this scale"
    ours = claim("2", "3", "4", name="others").model_copy(update={"source": "project"})
    assert verdict(one, claim("1"), ours).pairs[0].adjusted_p == pytest.approx(p), "claims of the project are apart"
    shared = verdict(one, claim("1"), claim("1", name="again"))
    assert shared.pairs[0].adjusted_p == pytest.approx(p)


def test_pairs_are_of_equal_keys_alone() -> None:
    """Trainings on other data are other keys."""
    results: dict[str, dict[Hashable, float]] = {
        "a1": {(0, "x"): 1.0, (1, "x"): 2.0},
        "b1": {(0, "y"): 0.0, (1, "y"): 0.1},
    }
    found = judge([claim("1")], {"top1": results}, {})[0]
    assert (found.verdict, found.pairs[0].ours) == ("not run yet", None)
