"""What Ray, KubeRay and spikefleet need of one another in the manifests of k8s/."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import spikefleet.cli
from spikefleet.config.cluster_config import ClusterConfig
from spikefleet.config.recipes import list_recipes
from spikefleet.search.search_files import list_searches
from support.manifests import (
    LOCKED,
    PROJECT,
    built,
    cluster_spec,
    containers_in,
    every_cluster,
    every_job,
    manifest,
    pod_templates,
    ray_groups,
    retraining,
)


def gibibytes(quantity: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) / (1024 if unit == "Mi" else 1)


@every_cluster
def test_ray_asks_for_a_token_and_is_not_exposed(folder: str) -> None:
    spec = cluster_spec(folder)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == LOCKED["ray"]
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["headGroupSpec"]["enableIngress"] is False
    variables = {entry["name"] for container in containers_in(spec) for entry in container.get("env", [])}
    assert not variables & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}  # KubeRay keeps what it finds there


@every_cluster
def test_memory_is_bounded(folder: str) -> None:
    for group in ray_groups(folder):
        pod = group["template"]["spec"]
        resources = pod["containers"][0]["resources"]
        for name in set(resources["limits"]) - {"cpu"}:
            assert resources["requests"][name] == resources["limits"][name]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
        shared = mounted["/dev/shm"]["emptyDir"]
        assert shared["medium"] == "Memory"
        object_store = int(group["rayStartParams"]["object-store-memory"]) / 2**30
        assert object_store < gibibytes(shared["sizeLimit"]) < gibibytes(resources["limits"]["memory"])
        assert "/tmp" in mounted


@every_cluster
def test_runs_and_stores_are_on_one_claim(folder: str) -> None:
    claim = manifest(folder, "PersistentVolumeClaim", "spikefleet-data")
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce" if folder == "kind" else "ReadWriteMany"]
    settings = manifest(folder, "ConfigMap", "spikefleet-settings")
    train = typer.main.get_command(spikefleet.cli.app).commands["train"]  # type: ignore[attr-defined]
    read = {option.envvar for option in train.params if option.envvar}
    assert read == {name for name in settings["data"] if name.startswith("SPIKEFLEET_")}
    for group in ray_groups(folder):
        pod = group["template"]["spec"]
        held = {"name": "data", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
        assert held in pod["volumes"]
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert all(Path(settings["data"][name]).is_relative_to(mounts["data"]) for name in read)
        assert {"configMapRef": {"name": settings["metadata"]["name"]}} in pod["containers"][0]["envFrom"]


@every_cluster
def test_network_is_closed_but_for_ray(folder: str) -> None:
    policies = {m["metadata"]["name"]: m["spec"] for m in built(folder) if m["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    among = policies["among-ray-pods"]
    for template in pod_templates([retraining()] if folder == "retrain" else ray_objects(folder)):
        assert among["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert among["ingress"] == [{"from": [{"podSelector": among["podSelector"]}]}]
    assert among["egress"] == [{"to": [{"podSelector": among["podSelector"]}]}]
    reached = {name: spec["ingress"] for name, spec in policies.items() if "ingress" in spec}
    del reached["among-ray-pods"]
    outside = {
        name: [rule["ports"][0]["port"] for rule in rules]
        for name, rules in reached.items()
        if any("namespaceSelector" in source for rule in rules for source in rule["from"])
    }
    # What answers without a token has one source each.
    assert outside == {"operator-to-dashboard": [8265], "prometheus-to-metrics": [8080]}
    for name in outside:
        ((source,),) = [rule["from"] for rule in reached[name]]
        assert set(source) == {"namespaceSelector", "podSelector"}
    settings = manifest(folder, "ConfigMap", "spikefleet-settings")
    assert settings["data"]["GLOO_SOCKET_IFNAME"] == "eth0"


def ray_objects(folder: str) -> list[dict[str, Any]]:
    return [document for document in built(folder) if document["apiVersion"].startswith("ray.io/")]


@every_job
def test_job_has_the_standing_cluster_s_spec_and_ends(folder: str) -> None:
    job = manifest(folder, "RayJob")["spec"]
    assert not [m for m in built(folder) if m["kind"] == "RayCluster"]
    if folder in ("train", "tune"):
        assert job["rayClusterSpec"] == cluster_spec("base")
    assert job["shutdownAfterJobFinishes"] is True
    assert job["backoffLimit"] > 0
    assert job["activeDeadlineSeconds"] > 0
    assert job["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"


def parse(command: str) -> dict[str, Any]:
    program, *arguments = shlex.split(command)
    assert program == next(iter(PROJECT["project"]["scripts"]))
    group: Any = typer.main.get_command(spikefleet.cli.app)
    with group.make_context(program, arguments) as context:
        name, subcommand, rest = group.resolve_command(context, arguments)
        return {"command": name, **subcommand.make_context(name, rest, parent=context).params}


@every_job
def test_entry_point_is_a_command_that_the_cluster_has_room_for(folder: str) -> None:
    given = parse(manifest(folder, "RayJob")["spec"]["entrypoint"])
    (group,) = cluster_spec(folder)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    if folder == "tune":
        assert given["command"] == "tune"
        assert given["search"] in list_searches()
        return
    assert given["command"] == "train"
    assert given["recipe"] in list_recipes()
    assert int(given["workers"]) == group["replicas"] * int(group["rayStartParams"]["num-cpus"])
    assert limits.get("nvidia.com/gpu") == ("1" if given["gpu"] else None)
    assert given["gpu"] == (folder == "gpu")


def test_the_retraining_has_the_standing_cluster_s_spec_and_is_a_command() -> None:
    job = retraining()
    assert job["spec"]["rayClusterSpec"] == cluster_spec("base")
    trained = manifest("train", "RayJob")["spec"]
    assert {**job["spec"], "entrypoint": ""} == {**trained, "entrypoint": ""}
    given = parse(job["spec"]["entrypoint"])
    assert given["command"] == "retrain"
    assert job["metadata"]["name"] == "retrain-" + given["model"].replace("_", "-")


@every_cluster
def test_nodes_have_time_for_a_checkpoint_and_the_head_is_not_drained(folder: str) -> None:
    grace = ClusterConfig().grace_s
    for group in ray_groups(folder):
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= 2 * grace
    budget = manifest(folder, "PodDisruptionBudget", "ray-head")["spec"]
    assert (budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"]) == (0, "AlwaysAllow")
    assert budget["selector"]["matchLabels"]["ray.io/node-type"] == "head"


def test_a_wrong_option_is_noticed() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse("spikefleet train digits --worker-count 2")
