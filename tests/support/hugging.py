"""Tiny models of transformers with random weights, a family each, as folders that need no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

IMAGES = ("vit", "convnext")
DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gpt2")
ENCODERS = ("bert", "roberta", "distilbert", "deberta-v2")
VOCABULARY = 60

_LAYERS = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
_DECODER = {**_LAYERS, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "bert": _LAYERS,
    "roberta": _LAYERS,
    "distilbert": {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48, "vocab_size": VOCABULARY},
    # As the published ones: relative positions of all layers in one table, and a convolution beside the first layer.
    "deberta-v2": {
        **_LAYERS,
        "relative_attention": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "conv_kernel_size": 3,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "vit": {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 16,
        "patch_size": 4,
        "num_channels": 1,
    },
    "convnext": {
        "hidden_sizes": [8, 12, 16, 20],
        "depths": [1, 1, 2, 1],
        "num_channels": 1,
        "image_size": 32,
        "layer_scale_init_value": 1.0,
    },
    "llama": _DECODER,
    # Sliding windows in the upper half of the layers.
    "qwen2": {**_DECODER, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {**_DECODER, "head_dim": 8},
    "mistral": {**_DECODER, "sliding_window": 4},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "vocab_size": VOCABULARY,
        "n_positions": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def made(family: str, classes: int = 3, **changes: Any) -> Any:
    """A model of transformers for classification, with random weights far from zero, ready to answer."""
    config = transformers.AutoConfig.for_model(family, **(SETTINGS[family] | changes))
    config.num_labels = classes
    kind = "ImageClassification" if family in IMAGES else "SequenceClassification"
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def saved(family: str, folder: Path, classes: int = 3, **changes: Any) -> Any:
    """The same, in a folder as well."""
    model = made(family, classes, **changes)
    model.save_pretrained(folder)
    return model


def inputs(family: str) -> Any:
    """Three images, or three texts of several lengths as a tokeniser pads them."""
    generator = torch.Generator().manual_seed(1)
    if family in IMAGES:
        size = SETTINGS[family]["image_size"]
        return torch.randn(3, 1, size, size, generator=generator)
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([[9], [6], [2]])).long()
    padding = 1 if family == "roberta" else 0
    return {"input_ids": ids * mask + padding * (1 - mask), "attention_mask": mask}


def logits(model: Any, given: Any) -> torch.Tensor:
    """Of the model whole."""
    with torch.no_grad():
        answer: torch.Tensor = model(**(given if isinstance(given, dict) else {"pixel_values": given})).logits
    return answer


def tokeniser(folder: Path) -> None:
    """A tokeniser of few words, less than 200 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "fine", "dull", "number", *map(str, range(60))]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
