"""What we use of libraries that they do not promise to keep: an upgrade that takes it away fails here, and says where.

Each entry names what is used, the file that uses it, and why there is no public way.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("models/spikefleet_models", "pipelines/spikefleet_pipelines", "tune/spikefleet_tune", "platform/spikefleet")

TUNE = "tune/spikefleet_tune"
MODELS = "models/spikefleet_models"

PRIVATE = [
    (
        "torch.cpu:_is_vnni_supported",
        [],
        f"{MODELS}/low_precision.py",
        "without VNNI, oneDNN adds two int8 products up in 16 bits; torch has no public name for what the CPU has",
    ),
    (
        "ray.tune.experiment.config_parser:_create_trial_from_spec",
        ["spec", "parser"],
        f"{TUNE}/on_tune.py",
        "a SearchAlgorithm makes its trials by it, as Ray's own do; Searcher, the public way, numbers trials itself",
    ),
    (
        "ray.tune.experiment.config_parser:_make_parser",
        [],
        f"{TUNE}/on_tune.py",
        "_create_trial_from_spec takes it",
    ),
    (
        "ray.tune.search.search_algorithm:SearchAlgorithm._finished",
        None,
        f"{TUNE}/on_tune.py",
        "what set_finished sets",
    ),
    (
        "ray.tune.execution.class_cache:ENV_VARS_TO_PROPAGATE",
        None,
        f"{TUNE}/on_tune.py",
        "keys of buckets would be sent with each trial, and be read by everybody with the cluster's token",
    ),
    (
        "optuna.trial:Trial._suggest",
        ["name", "distribution"],
        f"{TUNE}/samplers.py",
        "suggests from a distribution; the public methods build it anew from other arguments",
    ),
    (
        "ray._private.worker:_worker_logs_enabled",
        None,
        "platform/spikefleet/cluster/session.py",
        "the raylet's messages about a dead worker pass by log_to_driver",
    ),
    (
        "ray._private.state:state.get_draining_nodes",
        [],
        "platform/spikefleet/cluster/host_watch.py",
        "which hosts will be taken away; the public get_preemption_info is a barrier of all ranks",
    ),
    (
        "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer._initialize_and_run_controller",
        None,
        "platform/spikefleet/cluster/ray_train.py",
        "its local variable `controller` is the only handle of the actor that a waiting run must be ended by",
    ),
    (
        "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer._create_default_callbacks",
        [],
        "platform/spikefleet/cluster/ray_train.py",
        "leaves out the callback for Ray Data, which starts a process with each group of workers",
    ),
    (
        "ray.train.v2._internal.callbacks.datasets:DatasetsCallback",
        None,
        "platform/spikefleet/cluster/ray_train.py",
        "that callback",
    ),
    (
        "sys:_current_frames",
        None,
        "platform/spikefleet/cluster/ray_train.py",
        "finds that variable",
    ),
    (
        "ray._raylet:GcsClient",
        None,
        "platform/spikefleet/cluster/auth_token.py",
        "asks the cluster whether it takes the token; ray.init asks for a minute, and prints a line each second",
    ),
    *(
        (
            f"mlflow.store.db.utils:{name}",
            parameters,
            "platform/spikefleet/tracking/database.py",
            "builds the schema in a file that is not yet in place; MLflow's commands take seconds to start",
        )
        for name, parameters in (
            ("_initialize_tables", ["engine"]),
            ("_upgrade_db", ["engine"]),
            ("_get_alembic_config", ["db_url"]),
        )
    ),
    (
        "mlflow.utils.search_utils:SearchUtils.create_page_token",
        ["offset"],
        "platform/spikefleet/registry/lookup_index.py",
        "asks whether there are so many versions; MLflow has no count",
    ),
    (
        "os:_exit",
        ["status"],
        "pipelines/spikefleet_pipelines/loading.py",
        "a loader process ends in the middle of a batch, from another thread",
    ),
    (
        "torch.utils._python_dispatch:TorchDispatchMode",
        None,
        f"{MODELS}/spike_flow.py",
        "sees each operation of a forward pass; torch documents it, and has no public module for it",
    ),
    (
        "torch.utils._pytree:tree_map",
        None,
        "platform/spikefleet/training/stream.py",
        "the answers of some lanes, whatever a network returns",
    ),
    (
        "torch.utils._pytree:tree_leaves",
        None,
        f"{MODELS}/spike_flow.py",
        "tensors in the arguments of an operation",
    ),
    (
        "torch.nn:Module._modules",
        "instance",
        f"{MODELS}/spike_driven.py",
        "children are replaced while they are walked through",
    ),
    *(
        (
            f"torch.nn:Module.{hooks}",
            "instance",
            f"{MODELS}/spiking_unit.py",
            "a fused forward must not pass over hooks that somebody has set",
        )
        for hooks in ("_forward_hooks", "_forward_pre_hooks")
    ),
    (
        "torch:ops.aten.add.Tensor._schema",
        None,
        f"{MODELS}/spike_flow.py",
        "name and mutability of an operation",
    ),
    (
        "torch:ops.aten.add.Tensor._overloadname",
        None,
        f"{MODELS}/spike_flow.py",
        "tells view(dtype), which reads bits anew, from view(size)",
    ),
    (
        "torchvision.models.detection._utils:BoxCoder",
        None,
        f"{MODELS}/retinanet_loss.py",
        "RetinaNet's box coding",
    ),
    (
        "torchvision.models.detection._utils:encode_boxes",
        ["reference_boxes", "proposals", "weights"],
        f"{MODELS}/retinanet_loss.py",
        "RetinaNet's box coding, of boxes that belong to the anchors one by one",
    ),
    (
        "torchvision.models.detection._utils:Matcher",
        None,
        f"{MODELS}/retinanet_loss.py",
        "RetinaNet's matching of anchors",
    ),
]
"""(module:attribute, the first parameters or None where it is not called, our file, the reason)"""

PUBLIC_BUT_UNSAID = [
    ("ray.tune.search.search_algorithm:SearchAlgorithm.next_trial", [], f"{TUNE}/on_tune.py"),
    ("ray.tune.search.search_algorithm:SearchAlgorithm.is_finished", [], f"{TUNE}/on_tune.py"),
    ("ray.tune.search.search_algorithm:SearchAlgorithm.add_configurations", ["experiments"], f"{TUNE}/on_tune.py"),
    ("ray.tune.search.search_algorithm:SearchAlgorithm.total_samples", None, f"{TUNE}/on_tune.py"),
    ("ray.tune.experiment:Trial.get_error", [], f"{TUNE}/on_tune.py"),
    *(
        (f"ray.tune.schedulers:{name}.{method}", ["tune_controller", "trial", "result"], f"{TUNE}/schedulers.py")
        for name in ("FIFOScheduler", "ASHAScheduler", "MedianStoppingRule", "PopulationBasedTraining")
        for method in ("on_trial_result", "on_trial_complete")
    ),
    ("ray:nodes", [], f"{TUNE}/capacity.py"),
]
"""Methods that we override or call, which Ray's reference does not describe."""

ENVIRONMENT = [
    "TUNE_DISABLE_STRICT_METRIC_CHECKING",
    "TUNE_DISABLE_SIGINT_HANDLER",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS",
    "TUNE_FORCE_TRIAL_CLEANUP_S",
    "TUNE_MAX_PENDING_TRIALS_PG",
    "RAY_AIR_NEW_OUTPUT",
]


def find(name: str) -> Any:
    """What `module:attribute.attribute` names. Raises AttributeError or ImportError."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def check(name: str, parameters: list[str] | str | None) -> None:
    """Raises AssertionError when there is no such thing, or when it takes other parameters."""
    try:
        if parameters == "instance":
            owner, _, attribute = name.rpartition(".")
            assert hasattr(find(owner)(), attribute), f"an instance of {owner} has no {attribute}"
            return
        found = find(name)
    except (AttributeError, ImportError) as error:
        raise AssertionError(f"{name} is gone: {error}") from None
    if parameters is not None:
        taken = inspect.signature(found).parameters if _has_signature(found) else {}
        given = [one for one in taken if one != "self"][: len(parameters)]
        assert not taken or given == parameters, f"{name} takes {given} now, and we give it {parameters}"


def _has_signature(found: Callable[..., Any]) -> bool:
    try:
        inspect.signature(found)
    except ValueError:  # written in C
        return False
    return True


@pytest.mark.parametrize(("name", "parameters", "path", "reason"), PRIVATE, ids=lambda one: str(one))
def test_what_is_private_is_there_and_as_we_call_it(
    name: str, parameters: list[str] | str | None, path: str, reason: str
) -> None:
    assert name.rpartition(":")[2].rpartition(".")[2] in (ROOT / path).read_text(), f"{path} does not use it any more"
    try:
        check(name, parameters)
    except AssertionError as error:
        raise AssertionError(f"{error}; {path} needs it: {reason}") from None


@pytest.mark.parametrize(("name", "parameters", "path"), PUBLIC_BUT_UNSAID, ids=lambda one: str(one))
def test_what_is_undocumented_is_as_we_call_it(name: str, parameters: list[str] | None, path: str) -> None:
    try:
        check(name, parameters)
    except AssertionError as error:
        raise AssertionError(f"{error}; {path} needs it") from None


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_ray_tune_still_reads_its_switches(name: str) -> None:
    import ray

    assert name in (ROOT / TUNE / "on_tune.py").read_text()
    folder = Path(ray.__file__).parent
    readers = [path for room in ("tune", "air") for path in (folder / room).rglob("*.py") if name in path.read_text()]
    assert readers, f"Ray Tune does not know {name} any more; {TUNE}/on_tune.py sets it"


def test_what_is_gone_or_changed_is_noticed() -> None:
    with pytest.raises(AssertionError, match="is gone"):
        check("optuna.trial:Trial._proposes", [])
    with pytest.raises(AssertionError, match="is gone"):
        check("ray.tune.no_such_module:thing", None)
    with pytest.raises(AssertionError, match=r"takes \['name'\] now, and we give it \['key'\]"):
        check("optuna.trial:Trial._suggest", ["key"])
    with pytest.raises(AssertionError, match="has no _children"):
        check("torch.nn:Module._children", "instance")


def private_uses(source: str) -> Iterator[str]:
    """Private names of others in a source: imported ones, modules, and attributes of anything but self and cls."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("spikefleet"):
            if any(re.match("_[a-z]", part) for part in node.module.split(".")):
                yield from (alias.name for alias in node.names)
            yield from (alias.name for alias in node.names if re.match("_[a-z]", alias.name))
        elif isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            value = node.value
            yield from [] if isinstance(value, ast.Name) and value.id in ("self", "cls") else [node.attr]


def own_names(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_nothing_private_is_used_that_is_not_listed() -> None:
    sources = {path: path.read_text() for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")}
    allowed = {name for source in sources.values() for name in own_names(source)}
    allowed |= {"_replace", "_asdict", "_fields", "_make"}  # of a named tuple, documented
    allowed |= {part for name, *_ in PRIVATE for part in re.split("[:.]", name)}
    used = {(name, path) for path, source in sources.items() for name in private_uses(source)}
    unlisted = [f"{path.relative_to(ROOT)} uses {name}" for name, path in sorted(used) if name not in allowed]
    assert not unlisted, f"{'; '.join(unlisted)}: list it in PRIVATE with the reason, or find a public way"
    assert set(private_uses("from ray import _a\nfrom x._y import b\nlog._c(self._d)")) == {"_a", "b", "_c"}
