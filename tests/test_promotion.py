"""The gate between versions: what is better, or not told apart, is promoted; what is worse is not."""

import json
import shutil

import numpy as np
import pytest
from staged import TextEncoder, everything

from coterie.bundle import Bundle, seal
from coterie.config import EvaluateSettings
from coterie.contracts import HEAD_FILE
from coterie.promotion import compare_versions
from coterie.rewards import RewardHead
from coterie.scoring import Scorer

SETTINGS = EvaluateSettings(replicates=200)


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    return everything(tmp_path_factory.mktemp("run"))


def turned(bundle, out):
    """A copy of a bundle whose coteries want the opposite of what they want, with golden scores that agree."""
    shutil.copytree(bundle, out)
    described = Bundle.load(out).manifest.model_dump(exclude={"files", "model_version"})
    for file in out.glob(f"rewards/*/{HEAD_FILE}"):
        head = RewardHead.load(file)
        RewardHead(-head.weight, -head.center, head.scale).save(file)
    seal(out, described)
    scorer = Scorer(Bundle.load(out), TextEncoder())
    golden = json.loads((out / "golden.json").read_text())
    for entry in golden:
        made = scorer.score(entry["prompt"], entry["responses"])
        entry |= {"global": made.by_global.tolist(), "coteries": made.by_coterie.tolist()}
    (out / "golden.json").write_text(json.dumps(golden))
    seal(out, described)
    return out


def compare(candidate, incumbent, staged):
    return compare_versions(
        candidate, incumbent, staged.ingest / "comparisons.parquet", SETTINGS, encoder=TextEncoder()
    )


def test_the_same_bundle_is_no_worse_than_itself(staged):
    decision = compare(staged.bundle, staged.bundle, staged)
    assert decision["promote"]
    assert decision["log_loss"]["value"] == 0
    assert "not worse" in decision["reason"]


def test_a_worse_version_is_not_promoted_and_a_better_one_is(staged, tmp_path):
    worse = turned(staged.bundle, tmp_path / "worse")
    refused = compare(worse, staged.bundle, staged)
    assert not refused["promote"]
    assert "worse than the incumbent on validation prompts: log-loss +" in refused["reason"]
    assert refused["log_loss"]["low"] > 0
    versions = [Bundle.load(path).manifest.model_version for path in (worse, staged.bundle)]
    assert [refused["candidate"], refused["incumbent"]] == versions
    taken = compare(staged.bundle, worse, staged)
    assert taken["promote"]
    np.testing.assert_allclose(taken["log_loss"]["value"], -refused["log_loss"]["value"], rtol=1e-6)


def test_coteries_are_compared_with_one_reward_for_everybody(staged, tmp_path):
    alike = everything(tmp_path / "alike", coteries=1, groups=True)
    decision = compare(staged.bundle, alike.bundle, staged)
    assert decision["promote"]
    assert decision["log_loss"]["high"] < 0
    assert not compare(alike.bundle, staged.bundle, staged)["promote"]
