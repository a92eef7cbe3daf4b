"""The part of JobSet's own schema that our manifests use.

  python -m tests.launch.jobset_schema jobset.x-k8s.io_jobsets.yaml

writes jobset_schema.json from the definition that JobSet's releases carry.
"""

import json
import pathlib
import sys

import yaml

ROOT = pathlib.Path(__file__).parents[2]
KEPT = pathlib.Path(__file__).with_suffix(".json")
MANIFESTS = ("jobset", "gpu_jobset")


def used(schema: dict, value: object) -> dict:
    """Of a schema what a value needs: types, choices, and what must be there."""
    kept = {k: schema[k] for k in ("type", "enum", "required", "pattern") if k in schema}
    if isinstance(value, dict):
        named = schema.get("properties", {})
        kept["properties"] = {k: used(named[k], v) for k, v in value.items() if k in named}
        if isinstance(more := schema.get("additionalProperties"), dict):
            kept["additionalProperties"] = {k: v for k, v in more.items() if k in ("type", "anyOf")}
        if schema.get("x-kubernetes-preserve-unknown-fields") or (
            not named and "additionalProperties" not in schema
        ):
            kept["open"] = True
    if isinstance(value, list):
        kept["items"] = {}
        for each in value:
            kept["items"] = joined(kept["items"], used(schema["items"], each))
    return kept


def joined(one: dict, other: dict) -> dict:
    """Both parts of a schema."""
    both = lambda a, b: joined(a, b) if isinstance(a, dict) and isinstance(b, dict) else b
    return one | {k: both(one[k], v) if k in one else v for k, v in other.items()}


def problems(schema: dict, value: object, where: str = "") -> list[str]:
    """What of a value the schema does not allow."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    kind = kinds.get(schema.get("type", ""), object)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return [f"{where}: {value!r} is no {schema['type']}"]
    found = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: {value!r} is none of {schema['enum']}")
    if isinstance(value, dict):
        named, rest = schema.get("properties", {}), schema.get("additionalProperties")
        found += [f"{where}: no {name}" for name in schema.get("required", ()) if name not in value]
        for name, each in value.items():
            if name in named:
                found += problems(named[name], each, f"{where}.{name}")
            elif rest is not None:
                found += problems(rest, each, f"{where}.{name}")
            elif "open" not in schema:
                found.append(f"{where}: nothing reads {name}")
    if isinstance(value, list):
        for at, each in enumerate(value):
            found += problems(schema["items"], each, f"{where}[{at}]")
    return found


def manifest(name: str) -> dict:
    """One of ours."""
    return yaml.safe_load((ROOT / "launch" / f"{name}.yaml").read_text())


if __name__ == "__main__":
    crd = yaml.safe_load(pathlib.Path(sys.argv[1]).read_text())
    whole = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    part: dict = {}
    for name in MANIFESTS:
        part = joined(part, used(whole, manifest(name)))
    KEPT.write_text(json.dumps(part, indent=1, sort_keys=True) + "\n")
