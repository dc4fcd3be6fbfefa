"""Models of Hugging Face's transformers, ``hf:PATH_OR_NAME``, cut at their layers.

A block is the model without the layers of the other blocks, so its own ``forward`` computes them: what a layer needs
beside the activations (rotary tables, positions, causal masks) is made by the model where the block lives, and only the
mask of the padding travels. What block 0 is given, and hands on, has the names of the model's own arguments:

    {"input_ids", "attention_mask"} or the ids alone    ->  block 0  ->  {"inputs_embeds", "attention_mask"} or a tensor
    pixel_values, a tensor                              ->  block 0  ->  a tensor

The whole model exists on the meta device only. Embeddings are in the first block, the norm behind the layers in the
last one, and the model's head is its ``predictor``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from scpl_dist.models import hub
from scpl_dist.models.hub import PREFIX
from scpl_dist.run.imports import checked

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# Weights of the model that is compared with its blocks; a larger one is compared with fewer layers.
_CHECKED = 10**9
_TOLERANCE = 1e-4  # of logits, by the largest of them


@dataclass(frozen=True)
class _Family:
    """Where the parts of a model are, as paths inside its base model."""

    layers: str
    embeddings: Mapping[
        str, Callable[[], nn.Module | None]
    ]  # what the other blocks have in the place of these
    norm: str | None  # behind the layers
    head: tuple[
        str | Callable[[Any], nn.Module], ...
    ]  # paths inside the whole model, or a function of its config
    reads: Literal[
        "first", "last", "all"
    ]  # token that the head is given; all are images, which the model pools
    images: bool = False


class _Passed(nn.Module):
    """In the place of embeddings: what it is given is embedded already."""

    patch_embeddings = SimpleNamespace(
        projection=SimpleNamespace(weight=torch.empty(0))
    )  # whose type is asked for

    def forward(self, *args: Tensor | None, **kwargs: Tensor | None) -> Tensor:
        embedded = kwargs.get("inputs_embeds")
        if embedded is None:
            embedded = next(one for one in args if one is not None)
        return embedded


class _First(nn.Module):
    """The scores of those tokens that the tokeniser has: many a table of embeddings is longer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, scores: Tensor) -> Tensor:
        return scores[..., : self.classes]


class _Nothing(nn.Module):
    """In the place of what adds positions: they are in already."""

    def forward(self, positions: Tensor) -> Tensor:
        return torch.zeros((), device=positions.device)


def _of_config(name: str) -> Callable[[Any], nn.Module]:
    def activation(config: Any) -> nn.Module:
        from transformers.activations import ACT2FN

        made: nn.Module = ACT2FN[getattr(config, name)]
        return made

    return activation


def _tanh(config: Any) -> nn.Module:
    return nn.Tanh()


def _relu(config: Any) -> nn.Module:
    return nn.ReLU()


_EMBEDDED: Mapping[str, Callable[[], nn.Module | None]] = {"embeddings": _Passed}
_LLAMA = _Family("layers", {"embed_tokens": lambda: None}, "norm", ("score",), "last")
FAMILIES = {
    "bert": _Family(
        "encoder.layer", _EMBEDDED, None, ("bert.pooler.dense", _tanh, "dropout", "classifier"), "first"
    ),
    "roberta": _Family(
        "encoder.layer",
        _EMBEDDED,
        None,
        ("classifier.dropout", "classifier.dense", _tanh, "classifier.dropout", "classifier.out_proj"),
        "first",
    ),
    "distilbert": _Family(
        "transformer.layer", _EMBEDDED, None, ("pre_classifier", _relu, "dropout", "classifier"), "first"
    ),
    "deberta-v2": _Family(
        "encoder.layer",
        {**_EMBEDDED, "encoder.conv": lambda: None},
        None,
        ("pooler.dropout", "pooler.dense", _of_config("pooler_hidden_act"), "dropout", "classifier"),
        "first",
    ),
    "vit": _Family("layers", _EMBEDDED, "layernorm", ("classifier",), "first", images=True),
    "convnext": _Family("encoder.stages", _EMBEDDED, "layernorm", ("classifier",), "all", images=True),
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": _LLAMA,
    "gpt2": _Family(
        "h", {"wte": lambda: None, "wpe": _Nothing, "drop": nn.Identity}, "ln_f", ("score",), "last"
    ),
}
"""By ``model_type``; MiniLM is a BERT."""


def model_function(name: str) -> Callable[..., list[Callable[[], nn.Module]]]:
    """The model function of a folder, or of a model of the hub; ValueError if it cannot be cut."""
    place = hub.folder(name)
    config = hub.configuration(name, place)
    known = ", ".join(FAMILIES)
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model.name = {PREFIX + name!r}: is a {config.model_type}, which cannot be cut; these can be: {known}"
        )

    @partial(checked, key="model.args")
    def build(
        classes: int,
        blocks: int | None = None,
        pretrained: bool = True,
        head: Literal["classes", "tokens"] = "classes",
    ) -> list[Callable[[], nn.Module]]:
        """`head`: scores of classes, or of the next token, of each token (decoders)."""
        if head == "tokens" and classes > config.vocab_size:
            raise ValueError(
                f"model.name = {PREFIX + name!r}: has {config.vocab_size} tokens, and the tokeniser of the data "
                f"{classes}: use the tokeniser of the model, data.args.tokenizer = {name!r}"
            )
        whole = _Whole(name, _own(config, classes, head), head)
        number = min(4, whole.depth) if blocks is None else blocks
        if not 1 <= number <= whole.depth:
            raise ValueError(f"model.args: blocks = {blocks}: give 1 to {whole.depth}, its number of layers")
        if pretrained and not any((place / file).is_file() for file in WEIGHTS):
            raise ValueError(
                f"model.name = {PREFIX + name!r}: {place} has no {WEIGHTS[0]}: put it there, or draw the weights with "
                "model.args.pretrained = false"
            )
        weights = str(place) if pretrained else ""
        return [partial(whole.block, index, number, weights) for index in range(number)]

    return build


def _own(config: PretrainedConfig, classes: int, head: str) -> PretrainedConfig:
    """For so many classes, with what only training and cutting need."""
    config = copy.deepcopy(config)
    if head == "classes" and config.num_labels != classes:  # which would forget the names of the classes
        config.num_labels = classes
    return config


class _Whole:
    """The whole model on the meta device, and how it is cut."""

    def __init__(self, name: str, config: PretrainedConfig, head: Literal["classes", "tokens"]) -> None:
        self.name = name
        self.family = FAMILIES[config.model_type]
        self.head = head
        self.tied = head == "tokens" and config.tie_word_embeddings
        if head == "tokens" and self.family.reads != "last":
            raise ValueError(
                f'model.args: head = "tokens": {config.model_type} does not predict tokens; leave it out'
            )
        if self.tied:  # embeddings and head are in different blocks
            config.tie_word_embeddings = False
        self.config = config
        self.model = _made(config, self.family, head)
        self.base = getattr(self.model, self.model.base_model_prefix)
        self.depth = len(self.base.get_submodule(self.family.layers))
        self.names = {id(one): name for name, one in self.model.state_dict(keep_vars=True).items()}

    def block(self, index: int, number: int, weights: str) -> Block:
        """One of so many blocks, as a module of its own, with weights drawn where torch makes tensors."""
        first, last, family = index == 0, index == number - 1, self.family
        start, end = (self.depth * position // number for position in (index, index + 1))
        layers = self.base.get_submodule(family.layers)
        changes: dict[str, nn.Module | None] = {family.layers: nn.ModuleList(list(layers)[start:end])}
        if not first:
            changes |= {path: replaced() for path, replaced in family.embeddings.items()}
        if family.norm is not None and not last:
            changes[family.norm] = nn.Identity()
        if "pooler" in self.base._modules:
            changes["pooler"] = None  # is of the head
        part = self.base
        for path, module in changes.items():
            part = _exchanged(part, path.split("."), module)
        own = [self.base.get_submodule(family.layers)]
        own += [
            self.base.get_submodule(path)
            for path in (*family.embeddings, family.norm)
            if _has(self.base, path)
        ]
        known = {id(parameter) for module in own for parameter in module.parameters()}
        names = {
            f"model.{name}": self.names[id(one)] for name, one in part.state_dict(keep_vars=True).items()
        }
        shared = [name for name, one in part.named_parameters() if id(one) not in known]
        part = copy.deepcopy(part)
        part.config = copy.copy(part.config)
        part.config.num_hidden_layers = end - start
        part.config.use_cache = False
        if getattr(part.config, "layer_types", None):
            part.config.layer_types = part.config.layer_types[start:end]
        block = Block(_drawn(part, self.model))
        if number > 1:
            for name in shared:
                _fix(block.model, name)
        reads = "tokens" if self.head == "tokens" else family.reads if last else "mean"
        block.arrange("pixel_values" if family.images else "input_ids" if first else "inputs_embeds", reads)
        if last:
            block.predictor = self.predictor
            for name, one in self._head().state_dict(keep_vars=True).items():
                names[f"predictor.layers.{name}"] = self.names[id(one)]
        block.own_names = names
        block.original_names = dict(names)
        if last and self.tied:
            block.original_names["predictor.layers.0.weight"] = self.names[
                id(self.base.get_input_embeddings().weight)
            ]
        block.names_in_file = self.names_in_file
        block.published_weights = weights
        block.whole = self
        if first:
            if not family.images:
                block.positions = hub.positions(self.config)
            block.verify_cut = partial(_verify, self.name, self.config, self.head, number)
        return block

    def _head(self) -> nn.Sequential:
        parts = ("lm_head",) if self.head == "tokens" else self.family.head
        return nn.Sequential(
            *(
                self.model.get_submodule(part) if isinstance(part, str) else part(self.config)
                for part in parts
            )
        )

    def predictor(self, classes: int | None = None) -> nn.Module:
        made: nn.Sequential = _drawn(copy.deepcopy(self._head()), self.model)
        if self.head == "tokens" and classes is not None and classes < self.config.vocab_size:
            made.append(_First(classes))
        return made

    def joined(self, blocks: Sequence[Block], predictor: nn.Module) -> PreTrainedModel:
        """The whole model on the CPU with the tensors of all its blocks and of its head; it shares them."""
        state: dict[str, Tensor] = {}
        for block in blocks:
            state |= {block.own_names[key]: one for key, one in block.state_dict().items()}
        head = blocks[-1].own_names
        state |= {head[f"predictor.layers.{key}"]: one for key, one in predictor.state_dict().items()}
        model: PreTrainedModel = copy.deepcopy(self.model)
        model.to_empty(device="cpu")
        with torch.no_grad():
            model.apply(model._init_weights)  # of buffers that are in no file, such as rotary tables
        missing = model.load_state_dict(state, strict=False, assign=True).missing_keys
        if missing:
            raise ValueError(
                f"model.name = {PREFIX + self.name!r}: no block has {', '.join(missing[:3])}: {self._changed()}"
            )
        return model.eval()

    def _changed(self) -> str:
        version = hub.transformers().__version__
        return f"transformers {version} has changed the family {self.config.model_type}; take another model or version"

    def names_in_file(self, names: Iterable[str]) -> dict[str, str]:
        """Names of a published file and what this model calls them, without those of other heads."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        known = self.model.state_dict(keep_vars=True)
        prefix = self.model.base_model_prefix
        renamings = [
            one for one in get_model_conversion_mapping(self.model) if isinstance(one, WeightRenaming)
        ]
        ignored = [re.compile(one) for one in self.model._keys_to_ignore_on_load_unexpected or ()]
        parts = {prefix, *dict(self.base.named_children())}
        found: dict[str, str] = {}
        for name in names:
            own, _ = rename_source_key(name, renamings, [], prefix, known)
            passing = own.endswith(("position_ids", "inv_freq")) or any(one.search(own) for one in ignored)
            if own in known or (
                own.partition(".")[0] in parts and ".pooler." not in f".{own}" and not passing
            ):
                found[name] = own
        return found


class Block(nn.Module):
    """Consecutive layers of a model, and what is before or behind them."""

    predictor: Callable[[int], nn.Module] | str = "l"
    positions: int | None = None  # the longest text, where this is known
    original_names: Mapping[str, str]  # in files
    own_names: Mapping[str, str]  # in the whole model, which has no weights twice
    whole: _Whole
    names_in_file: Callable[[Iterable[str]], Mapping[str, str]]
    published_weights: str
    verify_cut: Callable[[], None]

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def arrange(self, given: str, reads: str) -> None:
        """The name of what it is given without names, and which tokens its heads read."""
        self._given, self._reads = given, reads

    def forward(self, carry: Any) -> Any:
        """``(B, L)`` ids, ``(B, L, D)`` activations or ``(B, C, H, W)`` images, or by name with a mask ``(B, L)``."""
        named = {self._given: carry} if isinstance(carry, Tensor) else dict(carry)
        if self.positions is not None and named["input_ids"].shape[1] > self.positions:
            raise ValueError(
                f"a text has {named['input_ids'].shape[1]} tokens, and the model takes {self.positions}: lower "
                "data.args.length"
            )
        mask = named.get("attention_mask")
        if mask is not None and mask.is_meta:  # which has no values to look at
            del named["attention_mask"]
        output = self.model(**named)
        pooled = self._reads == "all"
        activations: Tensor = output.pooler_output if pooled else output.last_hidden_state
        return activations if mask is None else {"inputs_embeds": activations, "attention_mask": mask}

    def feature(self, output: Any) -> Tensor:
        """``(B, D)``: the token that the model's head reads in the last block, the mean over all tokens before it.

        Of images at most 4x4 places; where the head reads each token, all of them ``(B, L, D)``.
        """
        mask: Tensor | None = None if isinstance(output, Tensor) else output["attention_mask"]
        activations: Tensor = output if isinstance(output, Tensor) else output["inputs_embeds"]
        if activations.dim() == 4:
            height, width = (min(4, side) for side in activations.shape[2:])
            return functional.adaptive_avg_pool2d(activations, (height, width))
        if self._reads in ("tokens", "all"):
            return activations
        if self._reads == "first":
            return activations[:, 0]
        if self._reads == "last":
            if mask is None:
                return activations[:, -1]
            positions = torch.arange(mask.shape[1], device=mask.device)
            last = (positions * mask).argmax(1)
            return activations[torch.arange(len(activations), device=mask.device), last]
        if mask is None:
            return activations.mean(1)
        share = mask.to(activations.dtype)[:, :, None]
        return (activations * share).sum(1) / share.sum(1).clamp(min=1)


def _made(config: PretrainedConfig, family: _Family, head: str) -> PreTrainedModel:
    library = hub.transformers()
    kind = "ImageClassification" if family.images else "SequenceClassification"
    auto = getattr(library, f"AutoModelFor{'CausalLM' if head == 'tokens' else kind}")
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    return model


def _has(module: nn.Module, path: str | None) -> bool:
    try:
        return path is not None and module.get_submodule(path) is not None
    except AttributeError:
        return False


def _exchanged(module: nn.Module, path: Sequence[str], new: nn.Module | None) -> Any:
    """The same module with another one at a path; what is not on that path is shared."""
    if not path:
        return new
    changed = copy.copy(module)
    changed._modules = dict(module._modules)
    name, *rest = path
    old = module._modules[name]
    changed._modules[name] = None if old is None else _exchanged(old, rest, new)
    return changed


@torch.no_grad()
def _drawn(part: Any, model: PreTrainedModel) -> Any:
    """A part of a model, on "meta", with first weights where torch makes tensors at this moment."""
    device = torch.get_default_device()
    if device.type != "meta":
        part.to_empty(device=device)
        part.apply(model._init_weights)
    return part


@torch.no_grad()
def _fix(module: nn.Module, name: str) -> None:
    """Make a parameter that several blocks have a buffer: it is the same in all of them, and stays it."""
    path, _, own = name.rpartition(".")
    holder = module.get_submodule(path)
    value = getattr(holder, own).detach()
    delattr(holder, own)
    if value.dim() > 1 and not value.is_meta:
        value.normal_(0, 0.02, generator=torch.Generator(value.device).manual_seed(0))
    holder.register_buffer(own, value)


def _verify(name: str, config: PretrainedConfig, head: Literal["classes", "tokens"], number: int) -> None:
    """ValueError if the blocks do not give the logits that the model gives whole, with the same random weights.

    A large model is compared with fewer layers.
    """
    whole = _Whole(name, copy.deepcopy(config), head)
    weights = sum(one.numel() for one in whole.model.parameters())
    if weights > _CHECKED and not whole.family.images:
        each = sum(one.numel() for one in whole.base.get_submodule(whole.family.layers)[0].parameters())
        fewer = copy.deepcopy(config)
        fewer.num_hidden_layers = max(2, whole.depth - (weights - _CHECKED) // each)
        whole = _Whole(name, fewer, head)
        number = min(number, whole.depth)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(0)
        blocks = [whole.block(index, number, "").eval() for index in range(number)]
        predictor = whole.predictor().eval()
        given = _example(whole, generator)
        carry: Any = given if len(given) > 1 else next(iter(given.values()))
        for block in blocks:
            carry = block(carry)
        found = predictor(blocks[-1].feature(carry))
        wanted = whole.joined(blocks, predictor)(**given).logits
    difference = (found - wanted).abs().max().item() if found.shape == wanted.shape else float("inf")
    if not difference < _TOLERANCE * wanted.abs().max().item():
        raise ValueError(
            f"model.name = {PREFIX + name!r}: cut into blocks it gives other logits than whole (they differ by "
            f"{difference:.2g}): {whole._changed()}"
        )


def _example(whole: _Whole, generator: torch.Generator) -> dict[str, Tensor]:
    """Two inputs, the second of them shorter, with random ids that are no padding."""
    config: Any = whole.config
    if whole.family.images:
        size = getattr(config, "image_size", 64)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (2, config.num_channels, height, width)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    padding = config.pad_token_id
    if padding is None and whole.head == "classes":
        whole.model.config.pad_token_id = config.pad_token_id = padding = 0
    ids = torch.randint(0, config.vocab_size, (2, 8), generator=generator)
    if padding is not None:
        ids[ids == padding] = (padding + 1) % config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    ids[1, 5:] = padding or 0
    return {"input_ids": ids, "attention_mask": mask}
