"""The Grafana board asks for metrics that a run has, and shows each of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from spikefleet.cluster.gauges import GAUGES

BOARD = Path(__file__).parents[2] / "k8s" / "components" / "monitoring" / "grafana-board.json"


def asked(board: str) -> set[str]:
    """Names of the metrics in its queries."""
    return set(re.findall(r"\bray_(spikefleet_\w+)", board))


def test_the_board_shows_the_metrics_of_a_run_and_no_others() -> None:
    text = BOARD.read_text()
    assert asked(text) == set(GAUGES)
    board = json.loads(text)
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(queries) == len(GAUGES)
    assert all('{run=~"$run"}' in query for query in queries), "the variable `run` chooses"
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "run"}
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]}) == len(queries)


def test_another_name_is_noticed() -> None:
    assert asked("rate(ray_spikefleet_steps[5m])") - set(GAUGES) == {"spikefleet_steps"}
