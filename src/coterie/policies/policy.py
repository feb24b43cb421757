"""A policy: what answers prompts. A causal language model, as an adapter of a backbone; its files, and generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from coterie.backbones import backbone_source, device_of, dtype_of, no_model, quietly, revision_of
from coterie.contracts import write_text
from coterie.errors import BadBundle, BadConfiguration

POLICY_FILE, START = "policy.json", "start"
_ADAPTER_CONFIG = "adapter_config.json"  # PEFT's


class Answer(NamedTuple):
    """A response; `finished` where the policy ended it, not the limit."""

    text: str
    finished: bool


class PolicyCard(BaseModel):
    """policy.json: what a policy is an adapter of, and what it was tuned for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: str
    revision: str
    start: str | None = None  # folder, beside the policy's own, of the adapter that is merged into the backbone first
    role: str  # start, global or coterie-<k>
    method: str  # none, sft, ppo, grpo or rloo
    temperature: float
    prompt_tokens: int
    response_tokens: int
    seed: int
    reward_mean: float | None = None  # of the start's responses, by the reward that this policy was tuned against
    reward_sd: float | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the card of the policy in `folder`. Raises BadBundle: there is none, or it is not readable."""
        path = folder / POLICY_FILE
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            raise BadBundle(f"{path}: no policy can be read ({error}). Run the align stage again.") from error


@dataclass(frozen=True)
class Policy:
    """A loaded policy.

    Attributes:
        model: a causal model of transformers, with every adapter merged into it, or a PeftModel of one.
        tokenizer: its tokenizer, untouched.
        card: what it is.
    """

    model: Any
    tokenizer: Any
    card: PolicyCard

    @classmethod
    def load(cls, folder: Path, device: str = "auto", dtype: str = "auto", start: Path | None = None) -> Self:
        """Load the policy in `folder`: the backbone, with the start's adapter and its own merged in.

        Args:
            folder: of the policy.
            device, dtype: as in AlignSettings.
            start: folder of the start, where it does not lie beside `folder`.

        Raises:
            BadBundle: not a policy, or the start is not where it should be.
            BadConfiguration: the backbone cannot be loaded, or it is another revision than the policy's.
        """
        card = PolicyCard.read(folder)
        model, tokenizer, revision = load_backbone(card.backbone, card.revision, device, dtype)
        if revision != card.revision:
            raise BadConfiguration(
                f"{folder}: an adapter of {card.backbone} at revision {card.revision}; here it is at {revision}. "
                "Install that revision, or align again."
            )
        if card.start is not None:
            start = start or folder.parent / card.start
            if not (start / _ADAPTER_CONFIG).is_file():
                raise BadBundle(
                    f"{folder}: its start {start} holds no adapter. Fetch the start of the same run as well."
                )
            model = _merged(model, start)
        if (folder / _ADAPTER_CONFIG).is_file():
            model = _merged(model, folder)
        return cls(model, tokenizer, card)

    def generate(
        self,
        prompts: Sequence[str],
        n: int = 1,
        max_tokens: int = 48,
        temperature: float = 0.9,
        seed: int = 0,
        batch_size: int = 32,
    ) -> list[list[Answer]]:
        """Answer prompts, n times each. The same arguments make the same answers; temperature 0 is greedy."""
        rows = self.sample(prompts, n, max_tokens, temperature, seed, batch_size)
        return [[read_answer(self.tokenizer, ids) for ids in row] for row in rows]

    def sample(
        self, prompts: Sequence[str], n: int, max_tokens: int, temperature: float, seed: int, batch_size: int = 32
    ) -> list[list[list[int]]]:
        """What `generate` reads its answers from: token ids, up to and with the token that ends an answer."""
        import torch

        device, end = self.model.device, self.tokenizer.eos_token_id
        questions = prompt_ids(self.tokenizer, prompts)
        # By length, so that a batch holds little padding.
        order = [i for i in sorted(range(len(questions)), key=lambda i: len(questions[i])) for _ in range(n)]
        how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        answers: list[list[list[int]]] = [[] for _ in prompts]
        self.model.eval()
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            for begin in range(0, len(order), batch_size):
                rows = order[begin : begin + batch_size]
                width = max(len(questions[i]) for i in rows)
                ids = torch.tensor([[end] * (width - len(questions[i])) + questions[i] for i in rows], device=device)
                before = torch.tensor([width - len(questions[i]) for i in rows], device=device)
                mask = (torch.arange(width, device=device) >= before[:, None]).long()
                written = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, **how)
                for i, row in zip(rows, written[:, width:].tolist(), strict=True):
                    answers[i].append(row[: row.index(end) + 1] if end in row else row)
        return answers


def load_backbone(name: str, revision: str, device: str, dtype: str) -> tuple[Any, Any, str]:
    """A causal model, its tokenizer and its revision.

    Raises:
        BadConfiguration: it cannot be loaded, or its tokenizer has no token that ends a text.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    where, place = backbone_source(name), device_of(device)
    hub = {} if Path(where).is_dir() else {"revision": revision}
    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(where, **hub)
            model = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype_of(dtype, place)), **hub)
    except Exception as error:  # of the hub, the tokenizer, the weights: each library has its own
        raise no_model(name, error) from error
    if tokenizer.eos_token_id is None:
        raise BadConfiguration(
            f"the backbone {name}: its tokenizer names no token that ends a text (eos_token). Give one that does."
        )
    # A backbone's own habits of sampling (top-p, a repetition penalty) would make samples that are not the policy's.
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id
    )
    return model.to(place), tokenizer, revision_of(where, revision, model)


def prompt_ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts, up to where the answer begins: in the chat template, or with a blank line behind them."""
    template = bool(tokenizer.chat_template)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        if template
        else f"{prompt}\n\n"
        for prompt in prompts
    ]
    # A template writes special tokens out.
    ids: list[list[int]] = (
        tokenizer(texts, add_special_tokens=not template, verbose=False)["input_ids"] if texts else []
    )
    return ids


def read_answer(tokenizer: Any, ids: Sequence[int]) -> Answer:
    """The answer that token ids spell, up to the token that ends it."""
    finished = bool(ids) and ids[-1] == tokenizer.eos_token_id
    text: str = tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
    return Answer(text.strip(), finished)


def write_policy(folder: Path, card: PolicyCard, tokenizer: Any, model: Any = None) -> None:
    """Write a policy: its card, its tokenizer and, of a PeftModel, its adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    if model is not None:
        config = model.peft_config["default"]
        config.base_model_name_or_path, config.revision = card.backbone, card.revision  # not where it lies here
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink()  # a form that nobody filled in
    write_text(folder / POLICY_FILE, card.model_dump_json(indent=1))


def _merged(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
