"""Reward adapters: what they learn, what is written, and what happens when something goes wrong on the way."""

import json
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from staged import write_stages
from tiny_models import one_thread, write_backbone  # noqa: F401
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from coterie.config import RewardSettings
from coterie.contracts import COMPARISON, DIFFERENCE, SCORE, SCORES_FILE, content_id
from coterie.errors import BadBundle, BadConfiguration, BadData, RunFailed
from coterie.rewards import train_reward
from coterie.rewards.adapter_training import train_adapter
from coterie.rewards.adapters import AdapterRewards
from coterie.rewards.backbone import conversation, load_model, load_tokenizer, tokenized
from coterie.rewards.heads import mean_loss
from coterie.rewards.launch import Job, OutOfMemory, leave_failure

WORKERS = [f"w{i}" for i in range(8)]
SIGNS = ["!", "?"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return write_backbone(tmp_path_factory.mktemp("backbone"), hidden=16)


def write_comparisons(folder, likes, each=16, seed=0, long=(), ranked=(), ties=()):
    """Every worker compares a response that ends with "!" with one that ends with "?" and likes as `likes` [workers] says.

    `long`: workers with one more training comparison, of a long response; `ranked`: whose training comparisons are the
    pairs of one ranking; `ties`: who only say that both are alike.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for worker, liked in enumerate(likes):
        for i in range(each + (worker in long)):
            pair = ["".join(rng.choice(list("abcdef"), 4)) + sign for sign in (liked, SIGNS[liked == "!"])]
            pair[0] = "x" * 60 * (i == each) + pair[0]
            prompt, split = f"{i}", ["train", "train", "validation", "test"][i % 4]
            rows.append((worker, prompt, *pair, split, worker in ties, f"r{worker}" if worker in ranked else None))
    columns = {name: [] for name in (field.name for field in COMPARISON.fields)}
    for number, (worker, prompt, chosen, rejected, split, tie, ranking) in enumerate(rows):
        ids = [content_id(prompt, text) for text in (chosen, rejected)]
        row = {
            "comparison_id": f"c{number}", "worker_id": WORKERS[worker], "prompt": prompt, "prompt_id": prompt,
            "chosen": chosen, "rejected": rejected, "chosen_id": ids[0], "rejected_id": ids[1], "pair_id": "",
            "label": 0.5 if tie else 1.0, "ranking_id": ranking, "split": split, "source": "test",
        }  # fmt: skip
        for name, column in columns.items():
            column.append(row.get(name))
    COMPARISON.write(folder / "comparisons.parquet", columns)
    table = pd.DataFrame(rows, columns=["worker", "prompt", "chosen", "rejected", "split", "tie", "ranking"])
    table["comparison_id"] = [f"c{i}" for i in range(len(table))]
    table = table.sample(frac=1, random_state=0)  # the order is not that of the texts
    DIFFERENCE.write(
        folder / "differences.parquet",
        {
            "comparison_id": table["comparison_id"],
            "worker": table["worker"],
            "prompt": table["prompt"].astype(int),
            "split": table["split"],
            "label": np.where(table["tie"], 0.5, 1.0),
            "weight": np.where(table["ranking"].isna(), 1.0, 0.25),
            "x": np.zeros((len(table), 1), np.float32),
        },
        x=1,
    )
    return folder


def settings_of(backbone, **changed):
    wanted = {"learning_rate": 1e-2, "epochs": 4, "max_tokens": 40, "lora_rank": 4, "device": "cpu", **changed}
    return RewardSettings(kind="adapter", backbone=str(backbone), **wanted)


def train(data, out, settings, audience=None, reliability=None, start=None):
    out.mkdir(parents=True)
    workers = np.ones(len(WORKERS))
    audience, reliability = (workers if given is None else np.array(given, float) for given in (audience, reliability))
    return train_adapter(data, data / "comparisons.parquet", out, settings, WORKERS, audience, reliability, start)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def apart(one, other):
    return float(sum((one[name] - other[name]).square().sum() for name in one).sqrt())


def same_bytes(one, other):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()] == []


@pytest.fixture(scope="module")
def everybody(tmp_path_factory, backbone):
    """Two groups: half like "!", half like "?"; the global adapter, and that of each."""
    folder = tmp_path_factory.mktemp("everybody")
    data = write_comparisons(folder / "data", "!!!!????", each=64)
    told = {"global": train(data, folder / "global", settings_of(backbone, epochs=1))}
    for k, own in enumerate(([1] * 4 + [0] * 4, [0] * 4 + [1] * 4)):
        settings = settings_of(backbone, epochs=2)
        told[k] = train(data, folder / f"coterie-{k}", settings, own, start=folder / "global")
    return folder, told


def test_a_coterie_learns_what_its_people_like_and_says_how_well(everybody):
    folder, told = everybody
    assert told["global"]["adapter_validation_log_loss"] > 0.6  # what one half likes the other does not
    rewards = AdapterRewards.load({name: folder / name for name in ("global", "coterie-0", "coterie-1")}, "cpu")
    scores = rewards.score(["7"] * 4, ["abcd!", "fedc!", "abcd?", "fedc?"])
    for k, sign in enumerate((1, -1)):
        assert told[k]["adapter_validation_log_loss"] < 0.3 < told[k]["adapter_global_validation_log_loss"]
        assert told[k]["adapter_train_log_loss"] < 0.3
        curve = np.array(told[k]["curve"])
        assert curve[-1, 0] == told[k]["steps"] == 32  # 128 comparisons, twice, 8 at a time
        assert curve[0, 1] > 0.6 > 0.3 > curve[-1, 1]
        margins = sign * (scores[f"coterie-{k}"][:2] - scores[f"coterie-{k}"][2:])
        assert (margins > 1).all()
    assert not list(folder.glob(".checkpoints"))


def test_what_is_written_scores_alike_by_peft_and_whatever_is_in_the_batch(everybody):
    from peft import PeftModel

    out = everybody[0] / "coterie-0"
    card = json.loads((out / "adapter.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForSequenceClassification.from_pretrained(card["backbone"], num_labels=1)
    model = PeftModel.from_pretrained(model, str(out)).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    prompts, responses = ["3", "14", "5"], ["abc?", "a" * 20 + "!", "f!"]
    texts = [conversation(tokenizer, *both) for both in zip(prompts, responses, strict=True)]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].numpy()
    rewards = AdapterRewards.load({"own": out}, "cpu")
    ours = rewards.score(prompts, responses)["own"]
    np.testing.assert_allclose(ours, card["scale"] * (theirs - card["center"]), atol=1e-5)
    alone = [rewards.score([p], [r])["own"][0] for p, r in zip(prompts, responses, strict=True)]
    np.testing.assert_allclose(ours, alone, atol=1e-5)


def test_adapters_share_a_batch_and_score_only_what_they_are_asked(everybody):
    names = ("global", "coterie-0", "coterie-1")
    rewards = AdapterRewards.load({name: everybody[0] / name for name in names}, "cpu")
    prompts, responses = ["3", "14", "5", "6"], ["abc?", "a" * 20 + "!", "f!", "gg?"]
    wanted = dict(zip(names, np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1]], bool), strict=True))
    passes = []
    backbone = rewards._model.get_base_model().model
    backbone.register_forward_hook(lambda module, inputs, output: passes.append(len(output[0])))
    scores = rewards.of_states(rewards.states(prompts, responses, wanted))
    assert passes == [6]
    # With enough to do, an adapter has passes of its own, which mixing would only slow down.
    prompts, responses = prompts * 3, [f"{i}{text}" for i in range(3) for text in responses]
    wanted = dict(zip(names, np.tile(np.array([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], bool), 3), strict=True))
    passes.clear()
    scores = rewards.of_states(rewards.states(prompts, responses, wanted))
    assert passes == [12, 6]
    for name, rows in wanted.items():
        alone = AdapterRewards.load({name: everybody[0] / name}, "cpu").score(prompts, responses)[name]
        np.testing.assert_allclose(scores[name][rows], alone[rows], atol=1e-5)
        assert np.isnan(scores[name][~rows]).all()


def test_every_held_out_response_is_scored_and_the_average_one_scores_zero(everybody):
    folder, told = everybody
    out = folder / "coterie-0"
    card, table = json.loads((out / "adapter.json").read_text()), SCORE.read(out / SCORES_FILE)
    scored = pd.Series(table["score"].to_numpy(), index=table["response_id"].to_pylist())
    comparisons = COMPARISON.read(folder / "data" / "comparisons.parquet").to_pandas()
    held = comparisons[comparisons["split"] != "train"]
    margin = scored[held["chosen_id"]].to_numpy() - scored[held["rejected_id"]].to_numpy()
    mine = (held["split"] == "validation") & (held["worker_id"] < "w4")
    loss = [mean_loss(c * margin[mine], np.ones(mine.sum()), np.ones(mine.sum())) for c in (1, card["scale"])]
    assert loss[0] == pytest.approx(told[0]["adapter_validation_log_loss"], abs=1e-5)
    assert loss[1] <= loss[0]
    assert told[0]["adapter_scale"] == card["scale"]
    ids = np.array(sorted({*comparisons["chosen_id"], *comparisons["rejected_id"]}))
    reference = ids[np.random.default_rng(0).choice(len(ids), 512, replace=False)]
    assert set(scored.index) == {*held["chosen_id"], *held["rejected_id"], *reference}
    assert scored[reference].mean() == pytest.approx(card["center"], abs=1e-5)


def test_a_coterie_starts_from_the_global_adapter_and_is_pulled_towards_it(everybody, backbone, tmp_path):
    folder, _ = everybody
    base, own = weights(folder / "global"), [1] * 4 + [0] * 4

    def moved(name, **changed):
        settings = settings_of(backbone, max_steps=8, **changed)
        train(folder / "data", tmp_path / name, settings, own, start=folder / "global")
        return apart(weights(tmp_path / name), base)

    assert moved("still", learning_rate=1e-9) < 1e-6
    assert moved("low", learning_rate=1e-9, dtype="bfloat16") < 1e-6  # what is trained is float32 nevertheless
    assert moved("held", pull=1e9) < 0.5 * moved("free", pull=0.0)


def test_bfloat16_trains_and_scores_about_as_float32(everybody, backbone, tmp_path):
    folder, _ = everybody
    settings = settings_of(backbone, dtype="bfloat16", epochs=2)
    told = train(folder / "data", tmp_path / "own", settings, [1] * 4 + [0] * 4, start=folder / "global")
    assert told["adapter_validation_log_loss"] < 0.4
    assert AdapterRewards.load({"own": tmp_path / "own"}, "cpu").exact  # what is read on a CPU is read in float32
    assert not AdapterRewards.load({"own": tmp_path / "own"}, "cpu", "bfloat16").exact
    assert {tensor.dtype for tensor in weights(tmp_path / "own").values()} == {torch.float32}
    texts = ["1"] * 3, ["abcd!", "e" * 12 + "?", "f?"]
    low, high = (AdapterRewards.load({"own": tmp_path / "own"}, "cpu", f"{t}") for t in ("bfloat16", "float32"))
    np.testing.assert_allclose(low.score(*texts)["own"], high.score(*texts)["own"], atol=0.2)


def test_workers_below_the_smallest_responsibility_do_not_count(everybody, backbone, tmp_path):
    folder, _ = everybody
    settings = settings_of(backbone, max_steps=3)
    for name, doubt in (("none", 0.0), ("little", 0.04), ("some", 0.06)):
        train(folder / "data", tmp_path / name, settings, [1] * 4 + [doubt] * 4, start=folder / "global")
    assert apart(weights(tmp_path / "none"), weights(tmp_path / "little")) == 0
    assert apart(weights(tmp_path / "none"), weights(tmp_path / "some")) > 0


def test_the_loss_is_that_of_the_weighted_comparisons_and_of_the_prior(everybody, backbone, tmp_path, monkeypatch):
    """Weights, rankings, reliability and ties, by hand, at the start and after the adapter has moved."""
    from coterie.rewards import trainer

    data = write_comparisons(tmp_path / "data", "!!!!????", each=4, ranked=[1], ties=[2])
    posterior, beta = np.linspace(0.3, 1, 8), np.linspace(0.5, 2, 8)
    seen = []
    loss_of = trainer._Trainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        mask = inputs["attention_mask"]
        loss = loss_of(self, model, dict(inputs), *args, **kwargs)
        with torch.no_grad():
            scores = model(input_ids=inputs["input_ids"], attention_mask=mask).logits[:, 0].double().numpy()
            moved = sum((now - start).square().sum() for now, start in self._pulled)
        named = {name: inputs[name].numpy().astype(float) for name in ("label", "weight", "reliability")}
        seen.append((loss.item(), scores, named, float(moved)))
        return loss

    monkeypatch.setattr(trainer._Trainer, "compute_loss", watched)
    settings = settings_of(backbone, batch_size=16, epochs=2, pull=5.0)
    train(data, tmp_path / "out", settings, posterior, beta, start=everybody[0] / "global")
    assert len(seen) == 2  # two steps of all 16 comparisons
    counted = np.repeat(posterior * np.where(np.arange(8) == 1, 0.25, 1), 2)
    for loss, scores, told, moved in seen:
        order = np.argsort(told["reliability"], kind="stable")  # that of the workers
        np.testing.assert_allclose(told["reliability"][order], np.repeat(beta, 2), rtol=1e-6)
        np.testing.assert_allclose(told["weight"][order], counted / counted.mean(), rtol=1e-6)
        assert (told["label"][order] == np.where(np.repeat(np.arange(8), 2) == 2, 0.5, 1)).all()
        margin = told["reliability"] * (scores[:16] - scores[16:])
        nats = mean_loss(margin, told["label"], told["weight"])
        assert loss == pytest.approx(nats + 5 / (2 * counted.sum()) * moved, rel=1e-5)
    assert seen[0][3] == 0 < seen[1][3]


def test_comparisons_with_a_long_side_are_left_out_and_counted_by_worker(backbone, tmp_path):
    data = write_comparisons(tmp_path / "data", "!!!!!!!!", long=[1, 6])
    settings = settings_of(backbone, max_steps=2)
    told = train(data, tmp_path / "all", settings)
    assert told["over_long"] == 2
    assert told["over_long_by_worker"] == {"w1": 1, "w6": 1}
    short = write_comparisons(tmp_path / "short", "!!!!!!!!")
    train(short, tmp_path / "without", settings)
    assert train(data, tmp_path / "own", settings, [1, 1] + [0] * 6, start=tmp_path / "all")["over_long"] == 1
    longest = AdapterRewards.load({"all": tmp_path / "all"}, "cpu").score(["1"] * 2, ["x" * 500 + "!", "y" * 500 + "!"])
    assert np.isfinite(longest["all"]).all()


def test_a_text_past_the_limit_loses_its_beginning_but_not_the_token_that_begins_every_text(backbone):
    tokenizer = load_tokenizer(str(backbone), "main")
    for bos, kept in ((None, "c<|end|><|assistant|>defg"), ("<|user|>", "<|user|><|end|><|assistant|>defg")):
        tokenizer.bos_token = bos
        tokens, longer = tokenized(tokenizer, ["abc", "a"], ["defg", "b"], 8)
        assert longer.tolist() == [True, False]
        assert tokenizer.decode(tokens[0].tolist()) == f"{kept}<|end|>"


def only_an_end(folder, backbone):
    """The backbone with a tokenizer whose one special token ends a text."""
    shutil.copytree(backbone, folder)
    vocabulary = {token: i for i, token in enumerate(["<|end|>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.add_special_tokens(["<|end|>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.mark.parametrize("kind", ["pad", "no pad", "pads with the end", "no template", "only an end"])
def test_the_score_is_that_of_the_last_token_whatever_pads(kind, backbone, tmp_path):
    if kind == "only an end":
        folder = only_an_end(tmp_path / "model", backbone)
    else:
        folder = write_backbone(tmp_path / "model", pad=kind == "pad", template=kind != "no template", hidden=16)
    if kind == "pads with the end":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder), "main")
    model, _ = load_model(str(folder), "main", "float32", tokenizer.pad_token_id)
    tokens, _ = tokenized(tokenizer, ["1", "22", "3"], ["a", "bcdefgh<|end|>", ""], 64)
    width = max(map(len, tokens))
    padded = torch.full((3, width + 3), tokenizer.pad_token_id)
    for line, ids in zip(padded, tokens, strict=True):
        line[: len(ids)] = torch.from_numpy(ids)
    mask = torch.tensor([[i < len(ids) for i in range(width + 3)] for ids in tokens]).long()
    with torch.no_grad():
        together = model(input_ids=padded, attention_mask=mask).logits[:, 0]
        hidden = [model.model(input_ids=torch.from_numpy(ids)[None].long())[0][0, -1] for ids in tokens]
        alone = model.score(torch.stack(hidden))[:, 0]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    ends = {tokenizer.decode(ids[-1:].tolist()) for ids in tokens}
    assert ends == ({"a", "h", " "} if kind == "only an end" else {"<|end|>"})


def test_a_loss_that_is_not_finite_stops_the_training_and_spoils_no_checkpoint(backbone, tmp_path):
    data = write_comparisons(tmp_path / "data", "!!!!!!!!")
    wild = settings_of(backbone, max_steps=4, checkpoint_steps=1, learning_rate=1e30)
    with pytest.raises(
        RunFailed, match=r"not finite at step [2-4] of 4 .*1e\+30.* Lower reward.learning_rate"
    ) as failure:
        train(data, tmp_path / "rewards" / "out", wild)
    kept = Path(str(failure.value).removesuffix(".").split("checkpoint is ")[1])
    assert kept.parents[1] == tmp_path / "rewards" / ".checkpoints"
    assert all(torch.isfinite(tensor).all() for tensor in weights(kept).values())
    # Another configuration does not go on from there, and leaves it where it is.
    for folder in ("rewards", "elsewhere"):
        train(data, tmp_path / folder / "other", settings_of(backbone, max_steps=4))
    assert same_bytes(tmp_path / "rewards" / "other", tmp_path / "elsewhere" / "other")
    assert kept.is_dir()


def test_where_memory_runs_out_half_the_batch_takes_the_same_steps(backbone, tmp_path, monkeypatch):
    from coterie.rewards import trainer

    data = write_comparisons(tmp_path / "data", "!!!!????", each=17)
    settings = settings_of(backbone, learning_rate=1e-3, checkpoint_steps=2, accumulation=2, epochs=1)
    whole = train(data, tmp_path / "whole", settings)
    room, steps, loss_of = 4, 0, trainer._Trainer.compute_loss

    def full(self, model, inputs, *args, **kwargs):
        nonlocal steps
        steps += 1
        if len(inputs["label"]) > room and steps > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss_of(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer._Trainer, "compute_loss", full)
    half = train(data, tmp_path / "half", settings)
    assert half["steps"] == whole["steps"] == 5
    np.testing.assert_allclose(half["curve"], whole["curve"], atol=1e-4)
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "half")[name], tensor, atol=1e-4, rtol=1e-3)
    room = 1
    with pytest.raises(RunFailed, match=r"GiB of memory do not hold a batch of 4 comparisons.* 40 tokens"):
        train(data, tmp_path / "none", settings)


@contextmanager
def files_of_at_most(size):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize("size", [8_000, 25_000])  # the adapter does not fit, its optimiser's state does not
def test_a_full_disk_is_named_and_a_later_run_goes_on(size, backbone, tmp_path):
    data = write_comparisons(tmp_path / "data", "!!!!!!!!")
    settings = settings_of(backbone, max_steps=3, checkpoint_steps=1)
    with files_of_at_most(size), pytest.raises(RunFailed, match=r"the disk of .*\.checkpoints.* is full"):
        train(data, tmp_path / "out", settings)
    shutil.rmtree(tmp_path / "out")
    assert train(data, tmp_path / "out", settings)["steps"] == 3


KILLED = """
import os, signal, sys
import numpy as np, torch
torch.set_num_threads(1)
sys.path.insert(0, "tests")
from pathlib import Path
from coterie.rewards import trainer
from test_adapters import settings_of, train
end = trainer._Watch.on_step_end
def die(self, args, state, control, **kwargs):
    end(self, args, state, control, **kwargs)
    if state.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
trainer._Watch.on_step_end = die
data, out, start, backbone = map(Path, sys.argv[1:])
train(data, out, settings_of(backbone, max_steps=12, checkpoint_steps=3), [1] * 4 + [.5] * 4, start=start)
"""


def test_a_run_that_was_killed_ends_where_no_kill_would_have(everybody, backbone, tmp_path):
    folder, _ = everybody
    data, own = folder / "data", [1] * 4 + [0.5] * 4
    killed = tmp_path / "killed" / "out"
    process = subprocess.Popen([sys.executable, "-c", KILLED, data, killed, folder / "global", backbone])
    settings = settings_of(backbone, max_steps=12, checkpoint_steps=3)
    undisturbed = train(data, tmp_path / "undisturbed" / "out", settings, own, start=folder / "global")
    assert process.wait(timeout=120) == -9
    (checkpoints,) = (tmp_path / "killed" / ".checkpoints").iterdir()
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    shutil.copytree(checkpoints / "checkpoint-3", checkpoints / "checkpoint-9")  # killed while it was written
    (checkpoints / "checkpoint-9" / "trainer_state.json").write_text('{"global_step"')
    shutil.rmtree(killed)
    resumed = train(data, killed, settings, own, start=folder / "global")
    assert same_bytes(killed, tmp_path / "undisturbed" / "out")
    assert resumed == undisturbed
    assert not checkpoints.parent.exists()


def test_two_processes_take_the_steps_of_one(backbone, tmp_path, monkeypatch):
    data = write_comparisons(tmp_path / "data", "!!!!????")
    settings = settings_of(backbone, learning_rate=1e-3, max_steps=4)
    alone = train(data, tmp_path / "alone", settings)
    monkeypatch.setenv("COTERIE_PROCESSES", "2")
    monkeypatch.setenv("COTERIE_CHECKPOINTS", str(tmp_path / "shared"))
    shared = train(data, tmp_path / "together", settings.model_copy(update={"batch_size": 4}))
    assert shared["steps"] == 4
    np.testing.assert_allclose(shared["curve"], alone["curve"], atol=1e-5)
    for name, tensor in weights(tmp_path / "alone").items():
        torch.testing.assert_close(weights(tmp_path / "together")[name], tensor, atol=1e-5, rtol=1e-3)
    assert (tmp_path / "shared").is_dir()
    assert not list((tmp_path / "shared").iterdir())


def test_what_goes_wrong_in_other_processes_is_told_here(backbone, tmp_path, monkeypatch):
    data = write_comparisons(tmp_path / "data", "!!!!!!!!")
    settings, asked = settings_of(backbone), []

    def run(command, check):
        job = Job.model_validate_json(Path(command[-1]).read_text())
        asked.append((job.batch_size, job.accumulation))
        assert {"torch.distributed.run", "--nproc-per-node=3"} <= set(command)
        if failures:
            leave_failure(job, failures.pop(0))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setenv("COTERIE_PROCESSES", "3")
    monkeypatch.setattr(subprocess, "run", run)
    failures = [OutOfMemory("too little"), RunFailed("not finite")]
    with pytest.raises(RunFailed, match=r"^not finite$"):
        train(data, tmp_path / "a", settings)
    assert asked == [(8, 1), (4, 2)]
    failures = [OutOfMemory("too little"), OutOfMemory("still too little")]
    with pytest.raises(RunFailed, match=r"^still too little$"):
        train(data, tmp_path / "d", settings)
    with pytest.raises(RunFailed, match="training in 3 processes ended with code 1"):
        train(data, tmp_path / "b", settings)
    monkeypatch.setenv("COTERIE_PROCESSES", "many")
    with pytest.raises(BadConfiguration, match="COTERIE_PROCESSES=many"):
        train(data, tmp_path / "c", settings)


def test_a_coterie_with_less_than_a_batch_gets_the_global_adapter_and_says_so(backbone, tmp_path):
    few = write_comparisons(tmp_path / "data", "!!!!????", each=8)
    train(few, tmp_path / "global", settings_of(backbone, max_steps=1))
    own = train(few, tmp_path / "own", settings_of(backbone), [1] + [0] * 7, start=tmp_path / "global")
    assert own["served_by"] == "the global adapter: there are 4 training comparisons, fewer than a batch of 8"
    assert same_bytes(tmp_path / "own", tmp_path / "global")
    assert own["adapter_validation_log_loss"] == own["adapter_global_validation_log_loss"]
    with pytest.raises(BadData, match="4 training comparisons, fewer than a batch of 8, are left"):
        train(few, tmp_path / "nobody", settings_of(backbone), [1] + [0] * 7)


def test_the_reward_stage_trains_head_and_adapter_and_asks_for_what_it_needs(backbone, tmp_path):
    staged = write_stages(tmp_path / "run", workers=8, comparisons=12)
    settings = settings_of(backbone, max_steps=1, max_tokens=256)
    base = tmp_path / "global"
    told = train_reward(staged.embed, staged.cluster, base, "global", settings, None, staged.ingest)
    assert {"train_log_loss", "adapter_train_log_loss", "over_long_by_worker", "curve"} <= told.keys()
    assert {"head.safetensors", "adapter_model.safetensors"} <= {path.name for path in base.iterdir()}
    with pytest.raises(BadConfiguration, match="give the comparisons"):
        train_reward(staged.embed, staged.cluster, tmp_path / "a", "global", settings)
    other = settings.model_copy(update={"backbone": "another"})
    with pytest.raises(BadConfiguration, match="holds no adapter of another"):
        train_reward(staged.embed, staged.cluster, tmp_path / "b", 0, other, base, staged.ingest)
    nowhere = settings.model_copy(update={"backbone": str(tmp_path / "nowhere")})
    with pytest.raises(BadConfiguration, match=r"the backbone .*nowhere.* cannot be loaded"):
        train_reward(staged.embed, staged.cluster, tmp_path / "c", "global", nowhere, None, staged.ingest)
    stranger = write_stages(tmp_path / "stranger", workers=8, comparisons=14, seed=1)
    with pytest.raises(BadData, match="not the comparisons that"):
        train_reward(stranger.embed, stranger.cluster, tmp_path / "d", "global", settings, None, staged.ingest)


def test_adapters_of_another_backbone_are_refused(everybody, backbone, tmp_path):
    folder, _ = everybody
    shutil.copytree(folder / "coterie-0", tmp_path / "own")
    card = json.loads((tmp_path / "own" / "adapter.json").read_text())
    (tmp_path / "own" / "adapter.json").write_text(json.dumps(card | {"revision": "0" * 16}))
    with pytest.raises(BadBundle, match="at revision 0000000000000000; here it is at"):
        AdapterRewards.load({"own": tmp_path / "own"}, "cpu")
    with pytest.raises(BadBundle, match="not adapters of one backbone"):
        AdapterRewards.load({"own": tmp_path / "own", "global": folder / "global"}, "cpu")
