"""What a finished run says to the person who started it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from coterie.bundle import Bundle
from coterie.contracts import PROFILE, RoutedInstance, matrix
from coterie.person import PROFILES_FILE, look_up
from coterie.report import verdict_line
from coterie.report.words import nats, points
from coterie.scoring import load_scorer


def closing_words(run: Path) -> str:
    """What was found and how sure it is, one pair of texts scored for two people and a stranger, and where to look."""
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
    lines += ["", *_example(run), "", f"Report: {run / 'report.html'}", f"Serve:  coterie serve {run / 'bundle'}"]
    return "\n".join(lines)


def _example(run: Path) -> list[str]:
    """The golden pair that two people of different coteries score most differently."""
    bundle = Bundle.load(run / "bundle")
    profiles = PROFILE.read(run / "publish" / PROFILES_FILE)
    coterie, posterior = profiles["coterie"].to_numpy(), matrix(profiles["posterior"])
    names = profiles["worker_id"].to_pylist()
    surest = [int(np.argmax(np.where(coterie == k, posterior[:, k], -1))) for k in sorted(set(coterie.tolist()))]
    gaps = [np.diff(np.array(entry["coteries"]), axis=0)[0] for entry in bundle.golden]
    entry = bundle.golden[int(np.argmax([np.ptp(gap) for gap in gaps]))]
    gap = np.diff(np.array(entry["coteries"]), axis=0)[0]
    two = [surest[int(np.argmin(gap))], surest[int(np.argmax(gap))]] if len(surest) > 1 else [surest[0]]
    scorer, path = load_scorer(bundle), run / "publish" / PROFILES_FILE
    lines = [f"Prompt: {entry['prompt'][:100]}"]
    lines += [
        f"  {letter}: {' '.join(text.split())[:110]}" for letter, text in zip("AB", entry["responses"], strict=True)
    ]
    people: list[tuple[str, str | None]] = [(f"worker {names[i][:10]}… of coterie {coterie[i]}", names[i]) for i in two]
    for label, known_as in [*people, ("a stranger", "nobody-we-know")]:
        taken = look_up(bundle, path, known_as)
        asked = RoutedInstance(prompt=entry["prompt"], responses=entry["responses"], route=taken)
        made = scorer.predict([asked])[0]
        source = "own profile" if made.source == "profile" else f"global reward, {made.reason}"
        lines.append(
            f"  {label:34} A {made.scores[0]:+.2f}  B {made.scores[1]:+.2f}  prefers {'AB'[made.best]}  ({source})"
        )
    return lines
