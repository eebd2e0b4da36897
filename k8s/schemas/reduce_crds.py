"""Reduces KubeRay's CustomResourceDefinitions to one strict JSON schema: python reduce_crds.py OUT CRD.yaml[.gz] ...

Strict means that a field which the CRD does not know is refused, as `kubectl apply --validate=strict` does. Schemas of
the built-in kinds that the manifests use are put together from the Kubernetes types inside the CRDs. Rules in CEL
(`x-kubernetes-validations`) are listed beside it by where they hold. What the operator's own code checks was never in
a CRD.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]

_KEPT = ("type", "enum", "pattern", "minimum", "minLength", "maxLength", "minItems", "anyOf")
_SHARED_FROM = 150  # characters of JSON from which a repeated part becomes a definition
_STRINGS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def strict(openapi: Schema) -> Schema:
    """The same schema in plain JSON Schema, with unknown fields refused and defaulted fields optional."""
    schema = {key: openapi[key] for key in _KEPT if key in openapi}
    if openapi.get("nullable"):
        schema["type"] = [schema["type"], "null"]
    if "items" in openapi:
        schema["items"] = strict(openapi["items"])
    if "properties" in openapi:
        fields = openapi["properties"]
        schema["properties"] = {name: strict(field) for name, field in fields.items()}
        schema["additionalProperties"] = False
        required = [name for name in openapi.get("required", []) if "default" not in fields[name]]
        if required:
            schema["required"] = required
    elif isinstance(openapi.get("additionalProperties"), dict):
        schema["additionalProperties"] = strict(openapi["additionalProperties"])
    return schema


def rules(openapi: Schema, where: list[str]) -> list[dict[str, str]]:
    """The rules in CEL below a schema: the path that each holds for (`[]` for every item), the rule, its message."""
    path = ".".join(where)
    found = [{"path": path, **rule} for rule in openapi.get("x-kubernetes-validations", [])]
    for name, field in openapi.get("properties", {}).items():
        found += rules(field, [*where, name])
    if "items" in openapi:
        found += rules(openapi["items"], [*where, "[]"])
    return found


def resource(api_version: str, kind: str, parts: Schema) -> Schema:
    """The schema of a whole manifest, with the metadata that a person writes."""
    metadata = {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": _STRINGS,
        "annotations": _STRINGS,
    }
    return {
        "type": "object",
        "properties": {
            "apiVersion": {"enum": [api_version]},
            "kind": {"enum": [kind]},
            "metadata": {"type": "object", "properties": metadata, "additionalProperties": False, "required": ["name"]},
            **parts,
        },
        "additionalProperties": False,
        "required": ["apiVersion", "kind", "metadata"],
    }


def built_in(cluster: Schema) -> dict[str, Schema]:
    """Namespace, ConfigMap, PersistentVolumeClaim and NetworkPolicy, from types that a RayCluster's fields share."""
    pod = cluster["headGroupSpec"]["properties"]["template"]["properties"]["spec"]["properties"]
    volume = pod["volumes"]["items"]["properties"]
    claim = volume["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]["spec"]
    rules = cluster["networkPolicy"]["properties"]["head"]["properties"]
    policy = {
        "podSelector": pod["affinity"]["properties"]["podAffinity"]["properties"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ]["items"]["properties"]["labelSelector"],
        "policyTypes": {"type": "array", "items": {"enum": ["Ingress", "Egress"]}},
        "ingress": rules["ingressRules"],
        "egress": rules["egressRules"],
    }
    policy_spec = {"type": "object", "properties": policy, "additionalProperties": False, "required": ["podSelector"]}
    return {
        "Namespace": resource("v1", "Namespace", {}),
        "ConfigMap": resource("v1", "ConfigMap", {"data": _STRINGS, "immutable": {"type": "boolean"}}),
        "PersistentVolumeClaim": resource("v1", "PersistentVolumeClaim", {"spec": claim}),
        "NetworkPolicy": resource("networking.k8s.io/v1", "NetworkPolicy", {"spec": policy_spec}),
    }


def is_schema(node: Any) -> bool:
    """Tells a schema from a map of properties, one of which may be called `type`."""
    return isinstance(node, dict) and isinstance(node.get("type"), str | list)


def share(kinds: dict[str, Schema]) -> Schema:
    """One document in which a part that occurs several times (a pod template) stands once."""
    seen: Counter[str] = Counter()

    def count(node: Any) -> None:
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            if isinstance(child, dict | list):
                count(child)
        if is_schema(node):
            seen[json.dumps(node, sort_keys=True)] += 1

    count(kinds)
    names: dict[str, str] = {}
    definitions: Schema = {}

    def refer(node: Any, name: str) -> Any:
        if isinstance(node, list):
            return [refer(child, name) for child in node]
        if not isinstance(node, dict):
            return node
        text = json.dumps(node, sort_keys=True)
        shared = is_schema(node) and seen[text] > 1 and len(text) >= _SHARED_FROM
        if shared and text in names:
            return {"$ref": f"#/$defs/{names[text]}"}
        # Names come before the walk into the children, so that they follow the order of the document.
        if shared:
            taken = sum(1 for other in names.values() if other.rpartition(".")[0] == name)
            names[text] = f"{name}.{taken}"
        keywords = ("type", "items", "properties", "additionalProperties")
        reduced = {key: refer(child, name if key in keywords else key) for key, child in node.items()}
        if not shared:
            return reduced
        definitions[names[text]] = reduced
        return {"$ref": f"#/$defs/{names[text]}"}

    roots = {kind: refer(schema, kind) for kind, schema in kinds.items()}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "kinds": roots, "$defs": definitions}


def main(out: Path, crds: list[Path]) -> None:
    kinds: dict[str, Schema] = {}
    cel: dict[str, list[dict[str, str]]] = {}
    for path in crds:
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        crd = yaml.safe_load(text)
        stored = next(version for version in crd["spec"]["versions"] if version["storage"])
        openapi = stored["schema"]["openAPIV3Schema"]["properties"]["spec"]
        spec = strict(openapi)
        kind = crd["spec"]["names"]["kind"]
        cel[kind] = rules(openapi, ["spec"])
        kinds[kind] = resource(f"{crd['spec']['group']}/{stored['name']}", kind, {"spec": spec})
    kinds |= built_in(kinds["RayCluster"]["properties"]["spec"]["properties"])
    out.write_text(json.dumps({**share(kinds), "rules": cel}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
