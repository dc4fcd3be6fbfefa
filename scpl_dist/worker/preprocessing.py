"""Keeps in the run folder what only the data set knows: classes, the form of an input, how raw ones become one."""

from __future__ import annotations

from pathlib import Path

from scpl_dist.control.messages import Dataset
from scpl_dist.data import DataSource
from scpl_dist.data.preprocessing import describe
from scpl_dist.storage.run_folder import RunFolder


def keep(run_dir: Path, data: Dataset, source: DataSource) -> None:
    """Write ``preprocessing.json``, and the files of the data source's preprocessing beside it.

    A data set that has none is kept, too: without raw inputs its model can still be built and be given tensors.
    """
    made = source.preprocessing
    described = {} if made is None else describe(made)
    save = (lambda folder: None) if made is None else made.save
    kept = {"classes": data.classes, "counts": data.counts, "input": data.input, **described}
    RunFolder(run_dir).keep_preprocessing(kept, save)
