"""Where MLflow shows the page of `spikefleet inspect`: artifact of the run, tag and link of the version."""

from __future__ import annotations

from pathlib import Path

from mlflow import MlflowClient

from spikefleet.inspection.links import link_run, link_version
from spikefleet.registry.version_page import INSPECTION
from spikefleet.runs.run_dir import Run
from support.registered import Trained


def test_a_version_has_a_tag_and_a_link(first: Trained, uri: str, tmp_path: Path) -> None:
    version = first.register("inspected")
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    page = tmp_path / "inspect.html"
    page.write_text("<html></html>")
    before = client.get_model_version("inspected", str(version.version))
    assert "Inspected" not in (before.description or "")
    said = link_version("models:/inspected/1", page, uri)
    assert f"tag {INSPECTION} of models:/inspected/1" in said
    held = client.get_model_version("inspected", str(version.version))
    folder = "inspection/inspected-1"
    assert held.tags[INSPECTION] == f"runs:/{first.run_id}/{folder}/inspect.html"
    assert [one.path for one in client.list_artifacts(first.run_id, folder)] == [f"{folder}/inspect.html"]
    experiment = client.get_run(first.run_id).info.experiment_id
    address = f"#/experiments/{experiment}/runs/{first.run_id}/artifacts/{folder}/inspect.html"
    assert held.description is not None
    assert f"]({address})" in held.description
    link_version("models:/inspected/1", page, uri)  # again: the same description
    assert client.get_model_version("inspected", "1").description == held.description


def test_a_run_has_an_artifact_and_its_version_the_tag(first: Trained, runs: Path, uri: str, tmp_path: Path) -> None:
    version = first.register("inspected_run")
    run = Run(runs / "first")
    page = tmp_path / "inspect.html"
    page.write_text("<html>of the run</html>")
    run.note(status="interrupted")
    assert link_run(run, page, uri) == "artifact report/inspect.html of run first"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    assert "report/inspect.html" in [one.path for one in client.list_artifacts(first.run_id, "report")]
    run.note(registered=f"inspected_run/{version.version}")
    assert f"tag {INSPECTION} of models:/inspected_run/1" in link_run(run, page, uri)
    tags = client.get_model_version("inspected_run", "1").tags
    assert tags[INSPECTION] == f"runs:/{first.run_id}/report/inspect.html"
