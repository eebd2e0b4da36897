"""The model of scaling on paper: its formulas, and that the README has its numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.paper_scaling import exchange, table

README = Path(__file__).parents[2] / "platform" / "README.md"


def test_the_readme_has_the_table_of_the_model() -> None:
    rows = [line for line in table().splitlines() if line.startswith("|") and "---" not in line]
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(rows) == 7
    assert [row for row in rows if row not in lines] == []


@pytest.mark.parametrize(("gpus", "sent"), [(1, 0), (2, 4_000_000), (4, 6_000_000), (1000, 7_992_000)])
def test_a_ring_sends_twice_what_each_gpu_lacks(gpus: int, sent: int) -> None:
    """Each of N parts of the gradients travels N - 1 hops to be summed, and N - 1 to be spread."""
    bytes_sent, seconds = exchange(gpus, 1_000_000)
    assert bytes_sent == pytest.approx(sent)
    assert seconds == pytest.approx(sent / 25e9 + 2 * (gpus - 1) * 20e-6)
