"""Adapters and policies in the pipeline, under kfp.local and on tiny backbones: from raw preferences to a released bundle."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import write_backbone

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(900)
def test_a_run_with_adapters_and_policies_releases_what_the_judges_let_serve(tmp_path):
    backbone, out = write_backbone(tmp_path / "backbone", pad=True), tmp_path / "run"
    settings = {
        "ingest.source": "simulated://groups?groups=2&workers=24&comparisons_per_worker=60&prompts=30&responses=4&seed=3",
        "ingest.validation_share": 0.15,
        "cluster.coteries": 2,
        "cluster.replicates": 0,
        "cluster.splits": 1,
        "embed.rank": 1,
        "evaluate.replicates": 100,
        "reward.kind": "adapter",
        "reward.backbone": backbone,
        "reward.max_steps": 4,
        "reward.max_tokens": 1024,
        "align.backbone": backbone,
        "align.method": "rloo",
        "align.sft_steps": 1,
        "align.steps": 2,
        "align.batch_size": 4,
        "align.group": 2,
        "align.response_tokens": 200,
        "judge.prompts": 8,
        "judge.best_of": 2,
        "judge.replicates": 100,
    }
    overrides = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "coterie.cli", "run", ROOT / "recipes" / "policies.yaml", *overrides, "--out", out]
    own = {"COTERIE_CACHE": str(tmp_path / "cache"), "COTERIE_PSEUDONYM_KEY": "a key of the tests, long enough"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COTERIE_")} | own
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stderr + (out / "run.log").read_text()[-3000:]

    manifest = json.loads((out / "release" / "manifest.json").read_text())
    made = {path.name for path in (out / "policies").iterdir()}
    assert {"start", "global"} <= made
    assert {gate["coterie"] for gate in manifest["policies"]} == {None, 0, 1}
    assert "  the global policy (coterie 0 " in done.stdout
    assert (out / "policies.html").read_bytes() == (out / "judge" / "policies.html").read_bytes()
    assert f"coterie serve {out / 'release'}" in done.stdout
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["heldout"]["seen"]["difference_to_linear"] is not None
