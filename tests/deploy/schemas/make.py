"""Makes the schemas beside this file from KServe's custom resource definitions.

    git clone https://github.com/kserve/kserve && python make.py kserve/config/crd/full

Descriptions are left out, unknown fields are refused, and of parts that our manifests do not have only the names stay.
"""

import json
import pathlib
import sys
from typing import Any

import yaml

OTHERS = {"affinity", "volumes", "workerSpec", "initContainers", "builtInAdapter", "transformer", "explainer"}
OTHERS |= {"huggingface", "lightgbm", "onnx", "paddle", "pmml", "pytorch", "sklearn", "tensorflow", "triton", "xgboost"}
OTHERS |= {"status", "topologySpreadConstraints", "logger", "autoScaling"}


def pruned(node: Any, name: str = "") -> Any:
    """A schema without what is not checked."""
    if isinstance(node, list):
        return [pruned(each) for each in node]
    if not isinstance(node, dict):
        return node
    if name in OTHERS:
        return {}
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = {
        key: {each: pruned(schema, each) for each, schema in value.items()} if key == "properties" else pruned(value)
        for key, value in node.items()
        if key not in ("description", "default", "format") and not key.startswith("x-")
    }
    if "properties" in found:
        found.setdefault("additionalProperties", False)
    return found


def main() -> None:
    """Writes a file for each resource."""
    for name in ("clusterservingruntimes", "inferenceservices"):
        text = (pathlib.Path(sys.argv[1]) / f"serving.kserve.io_{name}.yaml").read_text(encoding="utf-8")
        definition = yaml.safe_load(text)["spec"]
        (version,) = definition["versions"]
        schema = pruned(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        kind = {"apiVersion": {"const": f"{definition['group']}/{version['name']}"}}
        schema["properties"] |= kind | {"kind": {"const": definition["names"]["kind"]}}
        file = pathlib.Path(__file__).with_name(f"{name}.json")
        file.write_text(json.dumps(schema, sort_keys=True, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
