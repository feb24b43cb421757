"""What is served is what the library says offline, for every kind of reward, to 1e-4 in float32."""

import asyncio
import json

import numpy as np
import pytest
from staged import TextEncoder, everything, make_bundle, write_stages
from tiny_models import one_thread, write_backbone  # noqa: F401

from coterie.bundle import Bundle
from coterie.config import EvaluateSettings, RewardSettings
from coterie.contracts import Example, Route
from coterie.evaluation import evaluate
from coterie.rewards import train_reward
from coterie.scoring import Scorer
from serving.predictor import Predictor

PROMPT = "Question 3?"
RESPONSES = ["A short one.", "A far longer one, with river and bread and lamp.", "Warm stone."]
KINDS = ("one-reward", "coteries", "embedding", "adapter", "adapter-head")


def with_adapters(root, kind):
    """A bundle of two coteries whose rewards are adapters of a tiny backbone."""
    staged = write_stages(root, workers=12, comparisons=20)
    backbone = str(write_backbone(root / "backbone"))
    settings = RewardSettings(kind=kind, backbone=backbone, epochs=1, max_tokens=200, learning_rate=3e-3, device="cpu")
    base = staged.root / "rewards" / "global"
    for audience in ("global", 0, 1):
        folder = base.with_name(f"coterie-{audience}" if isinstance(audience, int) else audience)
        folder.mkdir(parents=True)
        told = train_reward(staged.embed, staged.cluster, folder, audience, settings, base, staged.ingest)
        (folder / "metrics.json").write_text(json.dumps(told))
    asked = EvaluateSettings(replicates=100)
    result = evaluate(staged.embed, staged.cluster, staged.rewards, asked, staged.ingest / "comparisons.parquet")
    # Whatever so short a training made of them, both coteries are to serve their own.
    result["gates"] = [gate | {"serves": "own"} for gate in result["gates"]]
    staged.evaluate.mkdir()
    (staged.evaluate / "metrics.json").write_text(json.dumps(result | {"ships": "coteries"}))
    make_bundle(staged, staged.bundle)
    return staged.bundle


@pytest.mark.parametrize("kind", KINDS)
def test_served_is_offline(tmp_path, kind):
    if kind.startswith("adapter"):
        folder = with_adapters(tmp_path, kind)
    else:
        folder = everything(tmp_path, coteries=1 if kind == "one-reward" else 2, ships=kind).bundle
    offline = Scorer(Bundle.load(folder), TextEncoder())
    manifest = offline.bundle.manifest
    assert manifest.ships == ("coteries" if kind.startswith("adapter") else kind)
    assert manifest.reward == ("adapter" if kind.startswith("adapter") else "head")
    rng, routes = np.random.default_rng(0), [Route(source="global", reason="no-worker")]
    for _ in range(10):
        posterior = rng.dirichlet(np.ones(manifest.coteries))
        place = rng.normal(size=manifest.rank).tolist()
        common = {"coterie": int(posterior.argmax()), "mixture_version": manifest.mixture_version}
        routes.append(Route(source="profile", posterior=posterior.tolist(), embedding=place, **common))
    instances = [
        {"prompt": PROMPT, "responses": RESPONSES[: 1 + i % 3], "routes": [route.model_dump()]}
        for i, route in enumerate(routes)
    ]
    examples = [{"prompt": PROMPT, "chosen": RESPONSES[1], "rejected": RESPONSES[0]}]
    instances.append({"prompt": PROMPT, "responses": RESPONSES, "comparisons": examples})

    predictor = Predictor("p", folder, TextEncoder())
    predictor.warm_up()

    async def ask():
        alone = [predictor({"instances": [instance], "explain": True}, {}) for instance in instances]
        plain, together = [
            (await predictor({"instances": instances, "explain": wish}, {}))[0] for wish in (False, True)
        ]
        return plain, together, await asyncio.gather(*alone)

    plain, together, alone = asyncio.run(ask())
    routes.append(offline.place([Example(**examples[0])]))
    for i, (route, instance) in enumerate(zip(routes, instances, strict=True)):
        expected = offline.score(PROMPT, instance["responses"], route.posterior, route.embedding)
        np.testing.assert_allclose(plain["predictions"][i]["scores"], expected.scores, atol=1e-4)
        for served in (together["predictions"][i], alone[i][0]["predictions"][0]):
            assert served["source"] == route.source
            np.testing.assert_allclose(served["scores"], expected.scores, atol=1e-4)
            explained = np.transpose([of["scores"] for of in served["explanation"]["coteries"]])
            np.testing.assert_allclose(explained, expected.by_coterie, atol=1e-4)
            np.testing.assert_allclose(served["explanation"]["by_global"], expected.by_global, atol=1e-4)
