"""Rewards on the global adapter's hidden state: a head a coterie, and theta and U of everybody by embedding."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.optimize import minimize
from staged import TextEncoder, make_bundle, write_stages
from test_adapters import settings_of
from tiny_models import one_thread, write_backbone  # noqa: F401

from coterie.bundle import Bundle
from coterie.config import EvaluateSettings
from coterie.contracts import ASSIGNMENT, COMPARISON, SCORE, STATES_FILE, matrix
from coterie.discovery.logistic import log_loss
from coterie.errors import BadBundle, BadData
from coterie.evaluation import evaluate
from coterie.rewards import PersonalHead, RewardHead, train_reward
from coterie.rewards.adapters import AdapterRewards, score_weight
from coterie.rewards.personal import fit_heads
from coterie.rewards.states import StateFeatures
from coterie.scoring import Scorer, check_golden


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return write_backbone(tmp_path_factory.mktemp("backbone"), hidden=32)


def train_all(staged, settings, audiences):
    """The global reward, and those of the audiences, below `staged.root`/rewards; what each stage said."""
    base, told = staged.root / "rewards" / "global", {}
    for audience in ("global", *audiences):
        folder = base.with_name(f"coterie-{audience}" if isinstance(audience, int) else audience)
        folder.mkdir(parents=True)
        told[audience] = train_reward(staged.embed, staged.cluster, folder, audience, settings, base, staged.ingest)
        (folder / "metrics.json").write_text(json.dumps(told[audience]))
    return told


def judge(staged):
    comparisons = staged.ingest / "comparisons.parquet"
    result = evaluate(staged.embed, staged.cluster, staged.rewards, EvaluateSettings(replicates=200), comparisons)
    staged.evaluate.mkdir()
    (staged.evaluate / "metrics.json").write_text(json.dumps(result))
    return result


def settings(backbone, **changed):
    return settings_of(backbone, **{"epochs": 2, "max_tokens": 200, "learning_rate": 3e-3, **changed}).model_copy(
        update={"kind": "adapter-head"}
    )


@pytest.fixture(scope="module")
def groups(tmp_path_factory, backbone):
    """Half of the people like long answers, half short ones."""
    staged = write_stages(tmp_path_factory.mktemp("groups"), workers=24, comparisons=40)
    return staged, train_all(staged, settings(backbone), (0, 1)), judge(staged)


@pytest.fixture(scope="module")
def personal(tmp_path_factory, backbone):
    staged = write_stages(tmp_path_factory.mktemp("personal"), workers=24, comparisons=40, ships="embedding")
    return staged, train_all(staged, settings(backbone), (0, 1, "embedding")), judge(staged)


def test_a_coteries_head_on_everybodys_adapter_finds_what_its_people_want(groups):
    staged, told, result = groups
    for k in (0, 1):
        assert told[k]["adapter_validation_log_loss"] < told[k]["adapter_global_validation_log_loss"] - 0.05
        assert result["gates"][k]["serves"] == "own"
        assert result["coteries"][k]["own_vs_global"]["log_loss"]["high"] < 0
        assert result["own_wrong"][k]["log_loss"]["high"] < 0
        common, own = (
            load_file(staged.rewards[name] / "adapter_model.safetensors") for name in ("global", f"coterie-{k}")
        )
        assert [name for name in common if not np.array_equal(common[name], own[name])] == [
            "base_model.model.score.weight"
        ]


def test_a_prior_of_infinite_precision_leaves_the_global_reward(groups, backbone, tmp_path):
    staged, _, _ = groups
    common = staged.rewards["global"]
    told = train_reward(
        staged.embed, staged.cluster, tmp_path, 0, settings(backbone, precision=1e8), common, staged.ingest
    )
    assert told["adapter_validation_log_loss"] == pytest.approx(told["adapter_global_validation_log_loss"], abs=1e-4)
    np.testing.assert_allclose(score_weight(tmp_path), score_weight(common), atol=1e-4)
    own, all_of_them = (SCORE.read(folder / "scores.parquet") for folder in (tmp_path, common))
    assert own["response_id"] == all_of_them["response_id"]
    np.testing.assert_allclose(own["score"], all_of_them["score"], atol=1e-4)


def test_peft_loads_a_coteries_head_and_it_scores_as_was_written(groups):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from coterie.rewards.backbone import conversation

    out = groups[0].rewards["coterie-1"]
    card, tokenizer = json.loads((out / "adapter.json").read_text()), AutoTokenizer.from_pretrained(out)
    model = AutoModelForSequenceClassification.from_pretrained(card["backbone"], num_labels=1)
    model = PeftModel.from_pretrained(model, str(out)).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    rows = COMPARISON.read(groups[0].ingest / "comparisons.parquet").to_pandas()
    rows = rows[rows["split"] == "test"][:5]
    texts = [conversation(tokenizer, *both) for both in zip(rows["prompt"], rows["chosen"], strict=True)]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].numpy()
    table = SCORE.read(out / "scores.parquet").to_pandas().set_index("response_id")["score"]
    np.testing.assert_allclose(theirs, table[rows["chosen_id"]], atol=1e-4)
    ours = AdapterRewards.load({"own": out}, "cpu").score(rows["prompt"].tolist(), rows["chosen"].tolist())["own"]
    np.testing.assert_allclose(ours, card["scale"] * (theirs - card["center"]), atol=1e-4)


def test_all_heads_of_one_adapter_read_one_pass_of_the_backbone(groups, monkeypatch, tmp_path):
    staged, _, _ = groups
    make_bundle(staged, tmp_path)
    bundle = Bundle.load(tmp_path)
    assert bundle.manifest.reward == "adapter"
    assert not list(tmp_path.rglob(STATES_FILE))
    assert "as PEFT adapters of" in (tmp_path / "README.md").read_text()
    scorer = Scorer(bundle, TextEncoder(), "cpu")
    check_golden(scorer)
    rounded = Scorer(bundle, TextEncoder(), "cpu", "bfloat16")
    check_golden(rounded)
    others = [entry | {"global": entry["global"][::-1]} for entry in bundle.golden]
    for one in (scorer, rounded):
        one.bundle = replace(bundle, golden=others)
        with pytest.raises(BadBundle, match="golden score"):
            check_golden(one)
        one.bundle = bundle
    passes = []
    model = scorer._adapters._model.get_base_model().model
    model.register_forward_hook(lambda *_: passes.append(1))
    scored = scorer.score(
        "Question 3?", ["A short one.", "A far longer one, with river and bread and lamp."], [0.2, 0.8]
    )
    assert len(passes) == 1
    assert np.abs(scored.by_coterie[:, 0] - scored.by_coterie[:, 1]).max() > 0.1
    np.testing.assert_allclose(scored.scores, scored.by_coterie @ [0.2, 0.8], rtol=1e-6)


def test_a_persons_reward_is_their_mixture_of_heads_on_everybodys_adapter(personal, tmp_path):
    staged, told, result = personal
    assert told["embedding"]["validation_log_loss"] < told["global"]["adapter_validation_log_loss"] - 0.05
    assert result["ships"] == "embedding"
    assert result["gates"][-1]["serves"] == "own"
    assert result["heldout"]["seen"]["difference_to_pooled"]["log_loss"]["high"] < 0
    head = PersonalHead.load(staged.rewards["embedding"])
    assert head.basis.shape == (32, 2)
    make_bundle(staged, tmp_path)
    scorer = Scorer(Bundle.load(tmp_path), TextEncoder(), "cpu")
    check_golden(scorer)
    row = ASSIGNMENT.read(staged.cluster / "assignments.parquet").slice(5, 1)
    place, posterior = (matrix(row[name])[0] for name in ("embedding", "posterior"))
    prompts, texts = ["Question 3?"] * 2, ["Short.", "A far longer one, with river and bread and lamp."]
    states = AdapterRewards.load({"global": staged.rewards["global"]}, "cpu").states(prompts, texts)["global"]
    served = scorer.score(prompts[0], texts, posterior, place).scores
    np.testing.assert_allclose(served, head.of(place).score(states), atol=1e-4)


def test_the_heads_by_embedding_are_the_optimum_of_what_they_say():
    rng = np.random.default_rng(0)
    x, a, w = rng.standard_normal((300, 4)), rng.standard_normal((300, 2)), rng.random(300)
    y, mean = (rng.random(300) < 0.7).astype(float), np.array([0.0, 1.0, 0.0, -1.0])

    def loss(flat):
        heads = flat.reshape(4, 3)
        margin = (x @ heads[:, 0]) + ((x @ heads[:, 1:]) * a).sum(1)
        return w @ log_loss(margin, y) + 1.5 * (((heads[:, 0] - mean) ** 2).sum() + (heads[:, 1:] ** 2).sum())

    found = minimize(loss, np.zeros(12), method="BFGS").x.reshape(4, 3)
    np.testing.assert_allclose(fit_heads(x, y, w, a, mean, 3.0), found, atol=2e-3)


def test_weights_of_state_features_are_the_same_weights_of_states():
    rng = np.random.default_rng(0)
    states, weight = rng.standard_normal((50, 6)).astype(np.float32) * [1, 2, 3, 4, 5, 6] + 3, rng.standard_normal(6)
    features = StateFeatures.fit(states.astype(np.float32), rng.integers(0, 50, (80, 2)), weight)
    seen, own = features.transform(states.astype(np.float32)), rng.standard_normal(7)
    both = (
        RewardHead(own).margin(seen[:9] - seen[9:18]),
        RewardHead(features.on_states(own)).margin(states[:9] - states[9:18]),
    )
    np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(features.on_states(features.prior_mean), weight)


def test_heads_without_the_global_adapters_states_are_refused_with_the_remedy(groups, backbone, tmp_path):
    staged, _, _ = groups
    shutil.copytree(staged.rewards["global"], tmp_path / "global")
    (tmp_path / "global" / STATES_FILE).unlink()
    with pytest.raises(BadData, match=r"no states.parquet. Train the global reward"):
        train_reward(staged.embed, staged.cluster, tmp_path, 0, settings(backbone), tmp_path / "global", staged.ingest)
