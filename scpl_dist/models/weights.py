"""First weights of a model, ``model.weights``: read tensor by tensor, so that a stage reads no more than its own.

names in the file       of what
blocks.<i>.<name>       an export of a run, which may have heads.<i>.<name> too
<i>.<name>              the state_dict of ``nn.Sequential(*blocks)``
any                     the network that the blocks are cut from, if they say what is called how in it: a block's
                        attribute ``original_names`` is {name in its state_dict: name there}, and may have names
                        "predictor.layers.<name>" of its predictor. Files that call them otherwise: a function
                        ``names_in_file`` makes of the names in a file {name there: name in the network}, without those
                        that are not of the network
"""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

Modules = Mapping[int, tuple[nn.Module, nn.Module]]  # a block and its heads, by block
_INSIDE = ("state_dict", "model_state_dict", "model")  # keys of a training program's own files
_WRAPPERS = ("module.", "_orig_mod.")  # before all names, of DataParallel and torch.compile
_SHOWN = 3
TORCHVISION = "torchvision:"  # before the name of published weights


def load(path: str, modules: Modules, strict: bool, whole: bool) -> str:
    """Put a file's tensors into blocks, and into their heads where they fit; on "meta" they are only looked at.

    Returns what does not fit, as one line; empty if all does. What is in the file beyond these modules counts if they
    are the `whole` model. ValueError: no such file; a weight that is not finite; nothing fits; with `strict`, something
    does not.
    """
    file = _translated(_open(path), next(iter(modules.values()))[0])
    missing, shapes, used = [], [], set[str]()
    for index, (block, heads) in modules.items():
        own, optional = max(_names(index, block, heads), key=lambda names: len(file.keys() & names[0].keys()))
        used |= own.keys() | optional.keys()
        for name, target in (own | optional).items():
            found = file.get(name)
            if found is not None and found.shape == tuple(target.shape):
                _take(path, name, found.read(), target)
            elif name in own and found is not None:
                shapes.append(f"{name} is {found.shape}, of the model {tuple(target.shape)}")
            elif name in own and not name.endswith("num_batches_tracked"):  # which older files do not have
                missing.append(name)
    unexpected = [name for name in file if name not in used and not name.startswith("heads.")]
    problems = [
        ("missing", missing),
        ("of another shape", shapes),
        ("unexpected", unexpected if whole else []),
    ]
    texts = [
        f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for what, names in problems
        if names
    ]
    if not texts:
        return ""
    text = f"model.weights = {path!r} does not fit the model: {'; '.join(texts)}"
    if whole and not used & file.keys():
        raise ValueError(
            f"{text}: no name is one of the blocks; see docs/training.md for the names that are known"
        )
    if strict:
        raise ValueError(
            f"{text}; take other weights, or set model.weights_strict = false to draw the rest at random"
        )
    return f"{text}; the rest is drawn at random"


def _names(
    index: int, block: nn.Module, heads: nn.Module
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """By each way of naming, tensors of the block, and of its heads, which are never needed."""
    own, optional = _tensors(block), _tensors(heads)
    yield (
        {f"blocks.{index}.{name}": tensor for name, tensor in own.items()},
        {f"heads.{index}.{name}": tensor for name, tensor in optional.items()},
    )
    yield {f"{index}.{name}": tensor for name, tensor in own.items()}, {}
    original: Mapping[str, str] = getattr(block, "original_names", {})
    yield (
        {original.get(name, f"blocks.{index}.{name}"): tensor for name, tensor in own.items()},
        {original[name]: tensor for name, tensor in optional.items() if name in original},
    )


def _translated(file: dict[str, _Stored], block: nn.Module) -> dict[str, _Stored]:
    translate: Callable[[Iterable[str]], Mapping[str, str]] | None = getattr(block, "names_in_file", None)
    if translate is None or any(name.startswith("blocks.") for name in file):
        return file
    return {own: file[name] for name, own in translate(file).items()}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Those in use, not copies."""
    state = module.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


@torch.no_grad()
def _take(path: str, name: str, tensor: Tensor, target: Tensor) -> None:
    # A buffer may be infinite, as masks are.
    sound = tensor.isfinite() if isinstance(target, nn.Parameter) else ~tensor.isnan()
    if not sound.all():
        raise ValueError(f"model.weights = {path!r}: {name} is NaN or infinite; take other weights")
    if not target.is_meta:
        target.copy_(tensor)


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def _of_torchvision(path: str) -> Path:
    """The file of weights that torchvision publishes, in the cache of torch's hub, where it is put if it is not."""
    from torchvision.models import get_weight  # which takes its time

    name = path.removeprefix(TORCHVISION)
    try:
        url = get_weight(name).url
    except ValueError as error:
        raise ValueError(
            f"model.weights = {path!r}: {error}; write {TORCHVISION}NAME_Weights.VERSION, such as "
            f"{TORCHVISION}ResNet18_Weights.IMAGENET1K_V1"
        ) from None
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not file.exists():
        print(f"{path}: downloading {url}", file=sys.stderr, flush=True)
        digest = re.search(r"-([0-9a-f]{8,})\.", file.name)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), digest and digest[1], progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"model.weights = {path!r}: {url} could not be downloaded ({error}); get it elsewhere, and give its "
                "path"
            ) from None
    return file


def _open(path: str) -> dict[str, _Stored]:
    """Tensors by name of a safetensors file, a folder with one or with its parts, or a file of torch.save."""
    place = _of_torchvision(path) if path.startswith(TORCHVISION) else Path(path)
    try:
        found = dict(_stored(place))
    except FileNotFoundError as error:
        missing = error.filename or path
        raise ValueError(f"model.weights = {path!r}: there is no {missing}; check the path") from None
    except (
        OSError,
        SafetensorError,
        RuntimeError,
        pickle.UnpicklingError,
        ValueError,
        KeyError,
        EOFError,
    ) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"model.weights = {path!r}: cannot be read ({type(error).__name__}: {reason}); give a file of safetensors "
            "or of torch.save(model.state_dict(), ...), or a folder with model.safetensors"
        ) from None
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in found):
            found = {name.removeprefix(wrapper): stored for name, stored in found.items()}
    return found


def _stored(path: Path) -> Iterator[tuple[str, _Stored]]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [path / part for part in sorted(set(parts))]
    elif path.is_dir():
        files = [path / "model.safetensors"]
    elif path.suffix == ".safetensors":
        files = [path]
    else:
        for name, tensor in _saved_by_torch(path).items():
            yield name, _Stored(tuple(tensor.shape), partial(_same, tensor))
        return
    for file in files:
        opened: Any = safe_open(file, "pt")  # which maps it, and reads what is asked for
        for name in opened.keys():  # noqa: SIM118  it is no mapping
            yield name, _Stored(tuple(opened.get_slice(name).get_shape()), partial(opened.get_tensor, name))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _saved_by_torch(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the format before torch 1.6 cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True)
    for key in _INSIDE:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ValueError(f"holds {type(state).__name__}, not tensors by name")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
