"""What a finished run says to the person who started it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coterie.answers import Asked, answer
from coterie.bundle import Bundle
from coterie.contracts import PROFILE, RoutedInstance, matrix
from coterie.person import PROFILES_FILE, look_up
from coterie.report import verdict_line
from coterie.report.words import nats, points, policies_line
from coterie.scoring import Question, Scorer, load_scorer
from coterie.staging import read_metrics


def closing_words(run: Path) -> str:
    """What was found and how sure it is, one pair of texts scored for two people and a stranger, one prompt answered by every
    policy that was tuned, and where to look."""
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    gain = metrics["heldout"]["seen"]["difference_to_pooled"]
    lines = [
        "",
        verdict_line(metrics),
        f"Against one reward for everybody, on test prompts: accuracy {points(gain['accuracy'])}, log-loss "
        f"{nats(gain['log_loss'])}.",
    ]
    for coterie in metrics["coteries"]:
        likes = ", ".join(coterie["likes"]) or "what everybody likes"
        lines.append(
            f"  coterie {coterie['id']}: {coterie['workers']} workers, serves {coterie['serves']}; likes {likes}"
        )
    if metrics["truth"] and "ari" in metrics["truth"]:
        lines.append(f"Simulated annotators: adjusted Rand index to the truth {metrics['truth']['ari']:.2f}.")
    tuned = (run / "judge").is_dir()
    scorer = load_scorer(Bundle.load(run / ("release" if tuned else "bundle")))
    lines += ["", *_example(run, scorer)]
    if tuned:
        lines += ["", *_answers(run, scorer)]
    lines += ["", f"Report: {run / 'report.html'}" + (f" and {run / 'policies.html'}" if tuned else "")]
    lines += [f"Serve:  coterie serve {scorer.bundle.path}"]
    return "\n".join(lines)


def _answers(run: Path, scorer: Scorer) -> list[str]:
    """Whose policy answers whom, and a test prompt answered by each, scored by every coterie."""
    judged = read_metrics(run / "judge")

    def finished(sample: Mapping[str, Any]) -> int:
        return sum(answer["finished"] for name, answer in sample["answers"].items() if "best-of" not in name)

    sample = max(judged["samples"], key=finished)
    answers = {name: given["text"] for name, given in sample["answers"].items() if "best-of" not in name}
    [scored] = scorer.score_many([Question(sample["prompt"], list(answers.values()))])
    lines = [policies_line(judged["gates"], judged["level"]), f"Prompt: {sample['prompt'][:100]}"]
    for (name, text), scores in zip(answers.items(), scored.by_coterie, strict=True):
        told = ", ".join(f"coterie {k} {score:+.2f}" for k, score in enumerate(scores))
        lines += [f"  the {name} policy ({told}):", f"    {' '.join(text.split())[:300]}"]
    return lines


def _example(run: Path, scorer: Scorer) -> list[str]:
    """The golden pair that two people of different coteries score most differently."""
    bundle = scorer.bundle
    profiles = PROFILE.read(run / "publish" / PROFILES_FILE)
    coterie, posterior = profiles["coterie"].to_numpy(), matrix(profiles["posterior"])
    names = profiles["worker_id"].to_pylist()
    surest = [int(np.argmax(np.where(coterie == k, posterior[:, k], -1))) for k in sorted(set(coterie.tolist()))]
    gaps = [np.diff(np.array(entry["coteries"]), axis=0)[0] for entry in bundle.golden]
    entry = bundle.golden[int(np.argmax([np.ptp(gap) for gap in gaps]))]
    gap = np.diff(np.array(entry["coteries"]), axis=0)[0]
    two = [surest[int(np.argmin(gap))], surest[int(np.argmax(gap))]] if len(surest) > 1 else [surest[0]]
    path = run / "publish" / PROFILES_FILE
    lines = [f"Prompt: {entry['prompt'][:100]}"]
    lines += [
        f"  {letter}: {' '.join(text.split())[:110]}" for letter, text in zip("AB", entry["responses"], strict=True)
    ]
    people: list[tuple[str, str | None]] = [(f"worker {names[i][:10]}… of coterie {coterie[i]}", names[i]) for i in two]
    for label, known_as in [*people, ("a stranger", "nobody-we-know")]:
        taken = look_up(bundle, path, known_as)
        asked = RoutedInstance(prompt=entry["prompt"], responses=entry["responses"], routes=[taken])
        [made] = answer(scorer, [Asked(asked)])
        source = "own profile" if made.source == "profile" else f"global reward, {made.reason}"
        lines.append(
            f"  {label:34} A {made.scores[0]:+.2f}  B {made.scores[1]:+.2f}  prefers {'AB'[made.best]}  ({source})"
        )
    return lines
