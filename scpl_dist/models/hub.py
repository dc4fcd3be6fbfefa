"""What Hugging Face has under the name of a model: a folder with its configuration, tokeniser and weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PREFIX = "hf:"
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
)


def folder(name: str) -> Path:
    """Where the files of a model are: the name itself, or what transformers keeps of the hub."""
    transformers()
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model.name = {PREFIX + name!r}: there is no folder {name}, and the hub does not give it ({reason}); give "
            "the path of a folder with config.json, or download it where there is a network"
        ) from None


def tokeniser(place: Path) -> Any:
    """The tokeniser in a folder, as transformers has it; ValueError if there is none."""
    reason = "no such file"
    if any(
        (place / file).is_file() for file in _VOCABULARIES
    ):  # without one transformers makes an empty tokeniser
        try:
            return transformers().AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().partition("\n")[0]
    raise ValueError(
        f"{place}: has no tokeniser that can be read ({reason}): put the files of the model's tokeniser there, such as "
        "tokenizer.json"
    )


def positions(config: PretrainedConfig) -> int:
    """The most tokens that a model takes."""
    offset = config.pad_token_id + 1 if config.model_type == "roberta" else 0  # where its positions begin
    found: int = config.max_position_embeddings - offset
    return found


def transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError(
            f'model.name = "{PREFIX}...": needs the package transformers: pip install "scpl_dist[hf]"'
        ) from None
    return transformers


def configuration(name: str, place: Path) -> PretrainedConfig:
    try:
        config: PretrainedConfig = transformers().AutoConfig.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model.name = {PREFIX + name!r}: {place}: config.json cannot be read ({reason}); give the folder of a "
            "model"
        ) from None
    return config
