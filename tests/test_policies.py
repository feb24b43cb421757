"""Policies: what they learn, that they stay near their start, what is written, and how they answer."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from served import HashingEncoder, make_bundle, write_comparisons
from tiny_models import one_thread, write_backbone  # noqa: F401
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from coterie.bundle import Bundle
from coterie.config import AlignSettings
from coterie.contracts import COMPARISON, TRAIN
from coterie.errors import BadBundle, BadConfiguration, BadData, RunFailed
from coterie.policies import Answer, Policy, PolicyCard, align, make_start
from coterie.policies.policy import prompt_ids, read_answer
from coterie.policies.reward import NO_ANSWER, NormalisedReward, bundle_reward
from coterie.scoring import Question, Scorer

METHODS = ["ppo", "grpo", "rloo"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Comparisons, and a start of a tiny backbone whose samples are not quite uniform."""
    root = tmp_path_factory.mktemp("policies")
    write_comparisons(root / "comparisons.parquet")
    write_backbone(root / "backbone")
    model = LlamaForCausalLM.from_pretrained(root / "backbone")
    model.lm_head.weight.data *= 20  # else no adapter below it could make any token likely
    model.save_pretrained(root / "backbone")
    make_start(root / "comparisons.parquet", root / "start", settings_of(root))
    return root


def settings_of(root, **changed):
    usual = {
        "method": "grpo",
        "backbone": str(root / "backbone"),
        "steps": 2,
        "batch_size": 8,
        "response_tokens": 12,
        "learning_rate": 1e-3,
        "kl_limit": 1000,
        "device": "cpu",
    }
    return AlignSettings(**usual | changed)


def small_letters(prompts, responses):
    """The share of a response that is small letters."""
    return np.array([sum(map(str.islower, text)) / max(len(text), 1) for text in responses])


def train_prompts(path):
    return {row["prompt"] for row in COMPARISON.read(path).to_pylist() if row["split"] == TRAIN}


def tuned(root, out, coterie="global", reward=small_letters, start="start", **changed):
    comparisons = root / "comparisons.parquet"
    return align(root, comparisons, root / start, out, coterie, settings_of(root, **changed), reward)


# -------------------------------------------------------------------------------------------------------------- rewards
def test_a_reward_of_a_bundle_is_what_its_scorer_says(tmp_path, monkeypatch):
    monkeypatch.setattr("coterie.scoring.load_encoder", lambda settings: HashingEncoder())
    path = make_bundle(tmp_path)
    prompts, responses = ["Question 1?", "Question 2?"], ["early train.", "a slow boat!"]
    scorer = Scorer(Bundle.load(path), HashingEncoder())
    told = scorer.score_many([Question(p, [r]) for p, r in zip(prompts, responses, strict=True)])
    by_global = bundle_reward(path, "global")(prompts, responses)
    np.testing.assert_allclose(by_global, [one.by_global[0] for one in told])
    by_coterie = bundle_reward(path, 1)(prompts, responses)
    np.testing.assert_allclose(by_coterie, [one.by_coterie[0, 1] for one in told])
    assert np.abs(by_global - by_coterie).min() > 1e-3
    for nobody in (3, -1):
        with pytest.raises(BadConfiguration, match=f"no coterie {nobody}; the bundle has 3"):
            bundle_reward(path, nobody)


def test_rewards_are_normalised_on_the_start_and_no_answer_earns_the_least():
    lengths = lambda prompts, responses: np.array([len(text) for text in responses])  # noqa: E731
    start = [Answer("a" * n, n % 2 == 0) for n in range(2, 12)]
    reward = NormalisedReward.of(lengths, [""] * 10, start)
    assert (reward.mean, reward.sd) == pytest.approx((6.5, np.std(np.arange(2, 12))))
    answers = [Answer("a" * 9, True), Answer("a" * 9, False), Answer("", True), Answer("a" * 1000, False)]
    earned = reward([""] * 4, answers)
    np.testing.assert_allclose(earned.raw, [9, 9, 0, 1000])
    np.testing.assert_allclose(earned.normalised, [2.5 / reward.sd, NO_ANSWER, NO_ANSWER, NO_ANSWER])
    worse = NormalisedReward(lengths, 1e6, 1.0)([""], [Answer("a", True)])
    assert worse.normalised == [NO_ANSWER]


def test_a_reward_that_is_not_finite_or_always_the_same_is_refused(root, tmp_path):
    with pytest.raises(BadData, match=r"the reward scores all 64 answers .* nothing to learn"):
        tuned(root, tmp_path, reward=lambda prompts, responses: np.ones(len(prompts)))
    calls = []

    def breaks(prompts, responses):
        calls.append(prompts)
        return np.where(
            np.arange(len(prompts)) == 3, np.nan if len(calls) > 1 else 0, small_letters(prompts, responses)
        )

    with pytest.raises(RunFailed, match=r"the reward of the answer .* to the prompt 'Question .* is nan"):
        tuned(root, tmp_path, reward=breaks)


# ------------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_an_adapter_of_the_untouched_backbone(root, tmp_path, method):
    asked = []

    def reward(prompts, responses):
        asked.append(list(prompts))
        return small_letters(prompts, responses)

    result = tuned(root, tmp_path / "coterie-1", 1, reward, method=method)
    assert {prompt for prompts in asked for prompt in prompts} <= train_prompts(root / "comparisons.parquet")
    assert len(asked) == 4  # the start, two updates, the end
    assert (result["prompts"], result["prompts_left_out"], result["steps"], result["stopped"]) == (20, 0, 2, None)
    first, second = result["curve"]
    assert first["kl"] == pytest.approx(0, abs=1e-4)
    assert second["kl"] > 0
    assert result["kl_end"] > 0
    assert 0 < first["entropy"] < np.log(100)
    for row in result["curve"]:  # most answers are unfinished, and earn the least
        assert NO_ANSWER <= row["normalised"] <= NO_ANSWER * (1 - row["finished"]) + 6 * row["finished"]
        assert 1 <= row["length"] <= 12
    assert result["reward_start"]["sd"] > 0

    card = PolicyCard.read(tmp_path / "coterie-1")
    assert (card.role, card.method, card.start, card.response_tokens) == ("coterie-1", method, None, 12)
    assert card.reward_mean == result["reward_start"]["mean"]
    loaded = Policy.load(tmp_path / "coterie-1", device="cpu")
    untouched = AutoModelForCausalLM.from_pretrained(root / "backbone")
    adapted = PeftModel.from_pretrained(untouched, tmp_path / "coterie-1")
    ids = torch.tensor(prompt_ids(loaded.tokenizer, ["Question 3?"]))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)
        with adapted.disable_adapter():
            assert (loaded.model(ids).logits - adapted(ids).logits).abs().max() > 1e-3
    assert str(root) not in (tmp_path / "coterie-1" / "adapter_config.json").read_text().replace(card.backbone, "")
    assert not (tmp_path / "coterie-1" / "README.md").exists()


@pytest.mark.parametrize("method", ["ppo", "rloo"])
def test_the_same_input_makes_the_same_policy(root, tmp_path, method):
    results = [tuned(root, tmp_path / name, method=method) for name in ("a", "b")]
    assert results[0] == results[1]
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]


def test_a_policy_learns_what_earns(root, tmp_path):
    result = tuned(root, tmp_path, steps=24, batch_size=16, learning_rate=2e-3, kl_limit=30)
    start = result["reward_start"]
    assert result["reward_end"] > start["mean"] + start["sd"]
    assert result["finished_end"] > result["finished_start"] + 0.3
    assert result["kl_end"] < 30


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_training_stops_at_the_limit_with_the_last_policy_within_it(root, tmp_path, method):
    result = tuned(root, tmp_path, method=method, steps=20, learning_rate=3e-3, kl_limit=0.5)
    last = result["curve"][-1]
    assert last["step"] < 20
    assert result["stopped"].startswith(f"the policy before update {last['step']} was {last['kl']:.1f} nats")
    beyond = [row["kl"] > 0.5 for row in result["curve"]]
    assert beyond[-2:] == [True, True]
    assert [True, True] not in [beyond[i : i + 2] for i in range(len(beyond) - 2)]
    assert result["steps"] == last["step"] - 3
    assert result["kl_end"] < last["kl"]


def test_a_last_update_beyond_the_limit_is_taken_back(root, tmp_path):
    result = tuned(root, tmp_path, steps=1, learning_rate=1e-2, kl_limit=1e-3)
    assert result["stopped"].startswith("after the last update")
    assert (result["steps"], result["kl_end"]) == (0, 0)
    assert result["reward_end"] == result["reward_start"]["mean"]


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_update(root, tmp_path):
    with pytest.raises(RunFailed, match=r"ppo: the loss is not finite any more at update 1 of 2"):
        tuned(root, tmp_path, method="ppo", learning_rate=1e30)
    assert not (tmp_path / "policy.json").exists()


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_a_prompt_is_told_exactly_where_another_begins_with_it(root, tmp_path, method):
    """Without a chat template nothing marks where the prompt ends; and there are fewer prompts than a batch."""
    write_backbone(tmp_path / "backbone", template=False, pad=True)
    rows = COMPARISON.read(root / "comparisons.parquet").to_pylist()
    texts = ["a", "a\n\na", "a\n\na\n\na"]
    rows = [rows[0] | {"prompt": text, "split": TRAIN} for text in texts] + [rows[1] | {"split": "test"}]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    COMPARISON.write(tmp_path / "comparisons.parquet", columns)
    make_start(tmp_path / "comparisons.parquet", tmp_path / "start", settings_of(tmp_path))
    asked = []

    def reward(prompts, responses):
        asked.append(sorted(prompts))
        return small_letters(prompts, responses)

    tuned(tmp_path, tmp_path / "out", reward=reward, method=method, steps=3, batch_size=12, group=4)
    times = 1 if method == "ppo" else 4
    drawn = [text for prompts in asked[1:-1] for text in prompts]
    assert {text: drawn.count(text) for text in texts} == dict.fromkeys(texts, 12)
    assert all(prompts.count(text) % times == 0 for prompts in asked[1:-1] for text in texts)


# --------------------------------------------------------------------------------------------------------------- start
def loss_on_chosen(policy, path):
    losses = []
    rows = [row for row in COMPARISON.read(path).to_pylist() if row["split"] == TRAIN]
    for row in rows:
        question = prompt_ids(policy.tokenizer, [row["prompt"]])[0]
        response = [*policy.tokenizer(row["chosen"])["input_ids"], policy.tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(question) + response])
        with torch.no_grad():
            losses.append(policy.model(torch.tensor([question + response]), labels=labels).loss.item())
    return np.mean(losses)


def test_a_start_that_was_tuned_on_chosen_responses_likes_them_better_and_carries_every_policy(root, tmp_path):
    comparisons = root / "comparisons.parquet"
    tuning = {"sft_steps": 15, "response_tokens": 40}
    result = make_start(comparisons, tmp_path / "start", settings_of(root, **tuning))
    rows = [row for row in COMPARISON.read(comparisons).to_pylist() if row["split"] == TRAIN]
    short = [row for row in rows if len(row["chosen"]) < 40]
    assert 0 < len(short) < len(rows)
    assert (result["examples"], result["examples_left_out"]) == (len(short), len(rows) - len(short))
    assert [row["step"] for row in result["curve"]] == list(range(1, 16))
    before, after = Policy.load(root / "start", "cpu"), Policy.load(tmp_path / "start", "cpu")
    assert loss_on_chosen(after, comparisons) < loss_on_chosen(before, comparisons) - 0.1

    shutil.copy(comparisons, tmp_path / "comparisons.parquet")
    settings = settings_of(root, **tuning)
    align(root, comparisons, tmp_path / "start", tmp_path / "coterie-0", 0, settings, small_letters)
    assert PolicyCard.read(tmp_path / "coterie-0").start == "start"
    own = Policy.load(tmp_path / "coterie-0", "cpu")
    merged = PeftModel.from_pretrained(after.model, tmp_path / "coterie-0")
    ids = torch.tensor(prompt_ids(own.tokenizer, ["Question 3?"]))
    with torch.no_grad():
        torch.testing.assert_close(own.model(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)
    elsewhere = tmp_path / "elsewhere" / "coterie-0"
    shutil.copytree(tmp_path / "coterie-0", elsewhere)
    with pytest.raises(BadBundle, match=r"its start .* holds no adapter"):
        Policy.load(elsewhere, "cpu")
    asked = ["Question 3?", "Question 6?"]
    assert Policy.load(elsewhere, "cpu", start=tmp_path / "start").generate(asked) == own.generate(asked)


# ---------------------------------------------------------------------------------------------------------- generation
def test_generation_is_seeded_and_knows_no_padding(root):
    policy = Policy.load(root / "start", "cpu")
    prompts = ["Hi", "A much longer prompt than the first one.", "Why?"]
    sampled = policy.generate(prompts, n=3, max_tokens=12, seed=5)
    assert sampled == policy.generate(prompts, n=3, max_tokens=12, seed=5)
    assert sampled != policy.generate(prompts, n=3, max_tokens=12, seed=6)
    assert [len(answers) for answers in sampled] == [3, 3, 3]
    assert len({answer.text for answers in sampled for answer in answers}) > 6
    greedy = policy.generate(prompts, max_tokens=12, temperature=0)
    assert greedy == [policy.generate([prompt], max_tokens=12, temperature=0)[0] for prompt in prompts]
    assert greedy == policy.generate(prompts[::-1], max_tokens=12, temperature=0, batch_size=2)[::-1]
    state = torch.random.get_rng_state()
    policy.generate(prompts[:1], max_tokens=2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert policy.generate([]) == []


def test_an_answer_is_finished_where_its_last_token_ends_a_text(root):
    policy = Policy.load(root / "start", "cpu")
    rows = policy.sample(["Hi"] * 40, 1, 12, 1.0, 0)
    end = policy.tokenizer.eos_token_id
    finished = [row[0][-1] == end for row in rows]
    assert 0 < sum(finished) < 40
    for [ids], ended in zip(rows, finished, strict=True):
        assert end not in ids[:-1]
        assert len(ids) == 12 or ended
        answer = read_answer(policy.tokenizer, ids)
        assert answer.finished == ended
        assert "<|" not in answer.text
    assert read_answer(policy.tokenizer, [*policy.tokenizer(" so. ")["input_ids"], end]) == Answer("so.", True)
    assert read_answer(policy.tokenizer, []) == Answer("", False)


# -------------------------------------------------------------------------------------------------------------- faults
def test_prompts_that_are_too_long_are_left_out_and_counted(root, tmp_path):
    result = tuned(root, tmp_path / "out", prompt_tokens=14)
    assert (result["prompts"], result["prompts_left_out"]) == (4, 16)  # "Question 0?" and the template's three tokens
    with pytest.raises(BadData, match="none of its 20 training prompts has at most 8 tokens"):
        tuned(root, tmp_path / "out", prompt_tokens=8)
    with pytest.raises(BadData, match=r"none of its .* chosen training responses ends within 4 tokens"):
        make_start(root / "comparisons.parquet", tmp_path, settings_of(root, sft_steps=1, response_tokens=4))


def test_bad_settings_and_folders_are_told(root, tmp_path):
    with pytest.raises(BadConfiguration, match=r"align\.method is none"):
        tuned(root, tmp_path, method="none")
    with pytest.raises(BadConfiguration, match=r"no whole number of groups of align\.group = 3"):
        tuned(root, tmp_path, group=3)
    with pytest.raises(BadConfiguration, match=r"align\.backbone is elsewhere"):
        tuned(root, tmp_path, backbone="elsewhere")
    with pytest.raises(BadBundle, match=r"policy\.json: no policy can be read"):
        Policy.load(tmp_path)
    with pytest.raises(BadConfiguration, match=r"the backbone .* cannot be loaded"):
        make_start(root / "comparisons.parquet", tmp_path / "out", settings_of(root, backbone=str(tmp_path)))
    card = json.loads((root / "start" / "policy.json").read_text())
    (tmp_path / "policy.json").write_text(json.dumps(card | {"revision": "another"}))
    with pytest.raises(BadConfiguration, match="at revision another; here it is at"):
        Policy.load(tmp_path, "cpu")
