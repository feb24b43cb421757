"""Policies in a bundle: which of them serve, and whose answers a question."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coterie.bundle import CARD_FILE, Bundle, seal
from coterie.contracts import BaseModelReference, PolicyGate
from coterie.errors import BadBundle, BadData
from coterie.manifest import RECORDS
from coterie.policies.policy import START, Policy, PolicyCard
from coterie.routing import policy_of

_POLICIES = "policies"


def bundle_policies(bundle: Path, policies: Mapping[str, Path], judged: Path, out: Path) -> dict[str, Any]:
    """Write into `out` the bundle with the policies that serve.

    Args:
        bundle: that holds the rewards.
        policies: folders by name: start, global, coterie-0 ...
        judged: folder of the judge stage, whose gates decide.

    Returns:
        As bundle.seal.

    Raises:
        BadBundle: the bundle is damaged. BadData: a policy that should serve is not there.
    """
    loaded = Bundle.load(bundle)
    gates = [PolicyGate(**gate) for gate in json.loads((judged / "metrics.json").read_text(encoding="utf-8"))["gates"]]
    serving = {START} | {policy_of(gates, gate.coterie) for gate in gates}
    if missing := sorted(serving - policies.keys()):
        raise BadData(f"{', '.join(missing)}: a policy that is to serve is not among those given; run `coterie align`")
    for name in loaded.manifest.files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle / name, out / name)
    for name in sorted(serving):
        ignored = shutil.ignore_patterns(*RECORDS, ".*")
        shutil.copytree(policies[name], out / _POLICIES / name, ignore=ignored)
    card = PolicyCard.read(policies[START])
    with (out / CARD_FILE).open("a", encoding="utf-8") as file:
        file.write(_section(gates, card, serving))
    described = loaded.manifest.model_dump(exclude={"files", "model_version"})
    models = [model for model in loaded.manifest.base_models if model.role != "policy"]
    models.append(BaseModelReference(name=card.backbone, revision=card.revision, role="policy"))
    return seal(out, described | {"policies": gates, "base_models": models})


def load_policy(bundle: Bundle, coterie: int | None, device: str = "auto", dtype: str = "auto") -> tuple[str, Policy]:
    """The policy that answers people of a coterie, or a stranger (None), and its name: start, global or coterie-<k>.

    Raises:
        BadBundle: the bundle holds no policies, or damaged ones. BadConfiguration: the backbone cannot be loaded.
    """
    if not bundle.manifest.policies:
        raise BadBundle(f"{bundle.path}: holds no policies; it scores answers and writes none. Run `coterie align`.")
    name = policy_of(bundle.manifest.policies, coterie)
    return name, Policy.load(bundle.path / _POLICIES / name, device, dtype)


def _section(gates: list[PolicyGate], card: PolicyCard, serving: set[str]) -> str:
    rows = "\n".join(
        f"| {'strangers' if gate.coterie is None else gate.coterie} | {policy_of(gates, gate.coterie)} | {gate.reason} |"
        for gate in sorted(gates, key=lambda gate: -1 if gate.coterie is None else gate.coterie)
    )
    return f"""
## Policies

LoRA adapters of `{card.backbone}` (revision `{card.revision}`) below `policies/`: {", ".join(sorted(serving))}.

| coterie | answered by | because |
|---|---|---|
{rows}

`coterie generate` answers a prompt with the policy of a person's coterie.
"""
