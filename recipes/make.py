"""Writes the recipes: one TOML file for each experiment of arXiv 2602.00062, model x data set x method.

``python recipes/make.py`` writes ``recipes/<data>/<model>-<method>.toml``. Settings are those of the published code;
where a method has published settings of its own (associated learning), those are taken. ``docs/results.md`` says what
is known of the published numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path

VISION = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "tiny_imagenet": "Tiny ImageNet, resized to 32x32"}
TEXT = {"ag_news": "AG News", "dbpedia_14": "DBpedia-14", "imdb": "IMDB", "sst2": "SST-2"}
MODELS = {
    "vision": {"vgg8": "VGG8", "resnet18": "ResNet18"},
    "text": {"lstm": "LSTM", "transformer": "Transformer"},
}
METHODS = {
    "scpl": "SCPL",
    "bp": "back-propagation (naive model parallelism on several stages)",
    "early_exit": "early exit (isolated local classifiers)",
    "gpipe": "GPipe",
    "al": "associated learning",
}


def recipe(kind: str, data: str, model: str, method: str) -> str:
    """Text of one recipe."""
    vision = kind == "vision"
    title = f"{MODELS[kind][model]} on {(VISION | TEXT)[data]}, {METHODS[method]}."
    lines = [f"# {title}", "# Written by recipes/make.py; change the table there.", ""]
    lines += ["[run]", f'method = "{method}"', f"epochs = {200 if vision else 50}", ""]
    lines += ["[model]", f'name = "{model}"', ""]
    augmentation = '\naugmentation = "strong"' if vision else ""
    lines += ["[data]", f'name = "{data}"', 'root = "data"', f"batch_size = 1024{augmentation}", ""]
    lines += ["[pipeline]", "stages = 4"]
    lines += ["micro_batches = 4", ""] if method == "gpipe" else [""]
    if method == "scpl":
        lines += [
            "[loss]",
            'name = "supcon"',
            "temperature = 0.1",
            f'projector = "{"m" if vision else "i"}"',
            "",
        ]
    if method == "early_exit":
        lines += ["[loss]", 'classifier = "m"', ""]
    if method == "al":
        widths = ['activation = "sigmoid"', "code = 500", "bridge = 2500"]
        lines += ["[al]", *(widths if vision else ['activation = "tanh"', "code = 128", "bridge = 0"]), ""]
    lines += ["[optimizer]", "lr = 1e-3", f"end_lr = {'1e-5' if vision else '1e-3'}", ""]
    lines += ["[checkpoint]", f"every_steps = {500 if vision else 1000}", ""]
    return "\n".join(lines)


def recipes() -> dict[str, str]:
    """All recipes: path below this folder to text."""
    found: dict[str, str] = {}
    for kind, sets in (("vision", VISION), ("text", TEXT)):
        for data in sets:
            for model in MODELS[kind]:
                for method in METHODS:
                    found[f"{data}/{model}-{method}.toml"] = recipe(kind, data, model, method)
    return found


def main() -> None:
    """Write all files."""
    folder = Path(__file__).parent
    for name, text in recipes().items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{len(recipes())} recipes in {folder}\n")


if __name__ == "__main__":
    main()
