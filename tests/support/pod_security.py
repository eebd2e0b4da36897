"""Pod Security Standard "restricted", and what this project adds to it."""

from __future__ import annotations

from support.manifests import Manifest, containers_in

VOLUMES = {"configMap", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


TALKS_TO_THE_API_SERVER = {"retrain"}
"""Components (the label) whose pods have an account's token."""


def violations(template: Manifest) -> list[str]:
    """What the standard, and our additions to it, have against a pod template."""
    spec = template["spec"]
    labels = template["metadata"]["labels"]
    pod = spec.get("securityContext", {})
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC", "hostUsers") if spec.get(key)]
    token = labels.get("app.kubernetes.io/component") in TALKS_TO_THE_API_SERVER
    found += ["automountServiceAccountToken"] if spec.get("automountServiceAccountToken") is not token else []
    found += [f"label {name}" for name in ("component", "part-of") if f"app.kubernetes.io/{name}" not in labels]
    found += [f"pod {key}" for key in ("sysctls", "seLinuxOptions", "windowsOptions") if key in pod]
    for volume in spec.get("volumes", []):
        found += [f"volume {kind}" for kind in set(volume) - {"name"} - VOLUMES]
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            found.append("emptyDir sizeLimit")
    for container in containers_in(spec):
        own = container.get("securityContext", {})
        effective = {**pod, **own}
        wanted = {
            "runAsNonRoot": effective.get("runAsNonRoot") is True,
            "runAsUser": effective.get("runAsUser", 0) != 0,
            "seccompProfile": effective.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "privileged": not own.get("privileged"),
            "capabilities.drop": own.get("capabilities", {}).get("drop") == ["ALL"],
            "capabilities.add": not own.get("capabilities", {}).get("add"),
            "procMount": own.get("procMount", "Default") == "Default",
            "hostPort": not any("hostPort" in port for port in container.get("ports", [])),
            "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is True,
            "requests and limits": all(
                {"cpu", "memory"} <= set(container.get("resources", {}).get(side, {}))
                for side in ("requests", "limits")
            ),
        }
        found += [name for name, kept in wanted.items() if not kept]
    return found
