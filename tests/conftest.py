"""What all tests share: quiet libraries, a prepared digits store, and one local Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported: processes that share two cores lose more by waiting for each other's threads than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from spikefleet.cluster.session import quiet_ray
from spikefleet.tracking.mlflow_client import quiet_mlflow

quiet_ray()
quiet_mlflow()
if TYPE_CHECKING:
    from spikefleet_models.kernels import CpuForm
    from support.built_database import BuiltOnce
pytest.register_assert_rewrite("support")  # its asserts then say as much as those of a test module
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "RAY_ADDRESS"):
    os.environ.pop(name, None)


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups next
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where there is none.

    Of several processes, one runs all tests of a file, for they share what is dear; and all tests of the group `ray`,
    whose files share a Ray, and which come first, for they take longest.
    """
    import torch

    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    items.sort(key=lambda item: not _shares_ray(item))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _shares_ray(node: pytest.Item | pytest.Collector) -> bool:
    group = node.get_closest_marker("xdist_group")
    return group is not None and group.args == ("ray",)


@pytest.fixture(scope="module", autouse=True)
def no_ray_elsewhere(request: pytest.FixtureRequest) -> None:
    """A Ray that the group `ray` has left running is ended for whoever is not of the group."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized() and not _shares_ray(request.node):
        ray.shutdown()


@pytest.fixture(autouse=True)
def mlflow_forgets() -> Iterator[None]:
    """MLflow keeps the last URIs it was given, also in the environment: no test hands them to the next."""
    yield
    if mlflow := sys.modules.get("mlflow"):
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri("")
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ.pop("MLFLOW_REGISTRY_URI", None)


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> BuiltOnce:
    """Builds a tracking database by copying the first one."""
    from support.built_database import BuiltOnce

    return BuiltOnce(tmp_path_factory.mktemp("database"))


@pytest.fixture(scope="module", autouse=True)
def databases_are_copied(request: pytest.FixtureRequest, built_once: BuiltOnce) -> Iterator[None]:
    """New tracking databases are copies in this process, but where it is tested what may befall their creation."""
    if "robustness" in request.path.parts:
        yield
        return
    from spikefleet.tracking import database

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "_build", built_once)
        yield


@pytest.fixture(scope="session")
def stores_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of stores in which digits are prepared."""
    from spikefleet_pipelines.sources import prepare

    folder = tmp_path_factory.mktemp("stores")
    prepare("digits", None, folder / "digits")
    return folder


@pytest.fixture(scope="module")
def ray_on_two_cpus() -> None:
    """A local Ray with two CPUs; the modules of the group `ray` share it."""
    import ray

    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            object_store_memory=200_000_000,
        )


@pytest.fixture
def lean_form() -> Iterator[None]:
    """The lean form of the spiking unit, which a call of the test must take, and none the native form."""
    from support.cpu_forms import assert_ran, chosen_form

    with chosen_form("lean") as ran:
        yield
    assert_ran("lean", ran)


@pytest.fixture(params=["lean", "native"])
def cpu_form(request: pytest.FixtureRequest) -> Iterator[CpuForm]:
    """Each form of the spiking unit on the CPU, which a call of the test must take."""
    from support.cpu_forms import assert_ran, chosen_form

    with chosen_form(request.param) as ran:
        yield request.param
    assert_ran(request.param, ran)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For trainings in this process whose figures are not looked at."""
    from spikefleet import plots
    from support.figures import DRAWN, nothing

    for name in DRAWN:
        monkeypatch.setattr(plots, name, nothing)


@pytest.fixture
def blank_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is done with the files of a training whose figures are not looked at."""
    from spikefleet import plots
    from support.figures import DRAWN, blank

    for name in DRAWN:
        monkeypatch.setattr(plots, name, blank(name))
