"""Policies in a bundle: which are taken along, whose answers a question, and what is refused."""

import json

import pytest
from click.testing import CliRunner
from staged import everything
from tiny_models import write_backbone

from coterie.bundle import Bundle
from coterie.cli import main
from coterie.config import AlignSettings
from coterie.errors import BadBundle, BadData
from coterie.policies import make_start
from coterie.policies.policy import PolicyCard, load_backbone, write_policy
from coterie.policies.release import bundle_policies, load_policy


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    return everything(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def policies(staged, tmp_path_factory):
    """A start and three adapters of it that differ, as the align stage leaves them."""
    import torch
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("policies")
    settings = AlignSettings(backbone=str(write_backbone(root / "backbone")), method="ppo", device="cpu")
    make_start(staged.ingest / "comparisons.parquet", root / "start", settings)
    card = PolicyCard.read(root / "start")
    for seed, name in enumerate(("global", "coterie-0", "coterie-1")):
        model, tokenizer, _ = load_backbone(card.backbone, card.revision, "cpu", "float32")
        torch.manual_seed(seed)
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        own = card.model_copy(update={"role": name, "method": "ppo"})
        write_policy(root / name, own, tokenizer, get_peft_model(model, lora))
        (root / name / "metrics.json").write_text("{}")
    return {name: root / name for name in ("start", "global", "coterie-0", "coterie-1")}


def judged(folder, **serves):
    """What the judge stage leaves; by name of the coterie, `everybody` for none."""
    gates = [
        {"coterie": None if name == "everybody" else int(name[1:]), "serves": value, "reason": f"because of {name}"}
        for name, value in serves.items()
    ]
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"gates": gates}))
    return folder


def test_the_policies_that_serve_are_taken_along(staged, policies, tmp_path):
    gates = judged(tmp_path / "judge", everybody="own", c0="own", c1="global", c2="start")
    made = bundle_policies(staged.bundle, policies, gates, tmp_path / "out")
    bundle = Bundle.load(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out" / "policies").iterdir()} == {"start", "global", "coterie-0"}
    assert bundle.manifest.model_version == made["model_version"] != Bundle.load(staged.bundle).manifest.model_version
    assert [model.role for model in bundle.manifest.base_models] == ["encoder", "policy"]
    assert not list((tmp_path / "out" / "policies").rglob("metrics.json"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 1 | global | because of c1 |" in card
    assert "| strangers | global | because of everybody |" in card
    named = [load_policy(bundle, k, "cpu")[0] for k in (None, 0, 1, 2)]
    assert named == ["global", "coterie-0", "global", "start"]


def test_where_no_policy_is_better_the_start_answers(staged, policies, tmp_path):
    gates = judged(tmp_path / "judge", everybody="start", c0="start", c1="own")
    bundle_policies(staged.bundle, policies, gates, tmp_path / "out")
    bundle = Bundle.load(tmp_path / "out")
    assert [load_policy(bundle, k, "cpu")[0] for k in (None, 0, 1)] == ["start", "start", "coterie-1"]
    assert {path.name for path in (tmp_path / "out" / "policies").iterdir()} == {"start", "coterie-1"}


def test_a_policy_that_should_serve_and_is_missing_is_named(staged, policies, tmp_path):
    gates = judged(tmp_path / "judge", everybody="own", c0="own", c1="own")
    some = {name: folder for name, folder in policies.items() if name != "coterie-1"}
    with pytest.raises(BadData, match="coterie-1: a policy that is to serve"):
        bundle_policies(staged.bundle, some, gates, tmp_path / "out")


def test_a_changed_policy_is_refused(staged, policies, tmp_path):
    gates = judged(tmp_path / "judge", everybody="own", c0="own", c1="own")
    bundle_policies(staged.bundle, policies, gates, tmp_path / "out")
    with (tmp_path / "out" / "policies" / "global" / "policy.json").open("a") as file:
        file.write(" ")
    with pytest.raises(BadBundle, match=r"policies/global/policy\.json is not the file that the manifest names"):
        Bundle.load(tmp_path / "out")


def test_generate_answers_with_the_policy_of_the_persons_coterie(staged, policies, tmp_path):
    gates = judged(tmp_path / "judge", everybody="own", c0="own", c1="own")
    bundle_policies(staged.bundle, policies, gates, tmp_path / "out")

    def generate(*person):
        asked = ["--prompt", "Tea?", "--max-tokens", "12", "--seed", "3"]
        done = CliRunner().invoke(main, ["generate", str(tmp_path / "out"), *asked, *person])
        assert done.exit_code == 0, done.output
        return done.stdout, done.stderr

    own, other = generate("--posterior", "0.9,0.1"), generate("--posterior", "0.1,0.9")
    assert "coterie-0" in own[1]
    assert "coterie-1" in other[1]
    assert own[0] != other[0]
    assert own[0] == generate("--posterior", "0.9,0.1")[0]
    assert "policy global (no-worker)" in generate()[1]


def test_a_bundle_without_policies_says_so(staged):
    done = CliRunner().invoke(main, ["generate", str(staged.bundle), "--prompt", "Tea?"])
    assert done.exit_code == 2
    assert "holds no policies" in done.output
