"""The file of one block: what of it is compared before it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scpl_dist.storage.checkpoints import CheckpointError, commit, folder_for
from scpl_dist.storage.parts import part_name, read_part, write_part


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = folder_for(tmp_path, 1)
    files = [write_part(folder / part_name(0), {"weight": torch.arange(1000.0)})]
    position = {"epoch": 0, "step": 1, "batch": 0}
    return commit(folder, {"step": 1, "position": position, "files": files}, keep=1)


def test_a_flipped_bit_of_a_weight_is_found_by_its_digest_only(checkpoint: Path) -> None:
    path = checkpoint / part_name(0)
    content = bytearray(path.read_bytes())
    content[content.index(torch.tensor(500.0).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256"):
        read_part(checkpoint, 0)
    found = read_part(checkpoint, 0, verified=True)["weight"]  # who says so has to be sure
    assert not torch.equal(found, torch.arange(1000.0))


@pytest.mark.parametrize("verified", [False, True])
def test_size_and_manifest_are_always_compared(checkpoint: Path, verified: bool) -> None:
    assert torch.equal(read_part(checkpoint, 0, verified=verified)["weight"], torch.arange(1000.0))
    with pytest.raises(CheckpointError, match=r"the manifest has no block-001\.pt"):
        read_part(checkpoint, 1, verified=verified)
    path = checkpoint / part_name(0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="bytes instead of"):
        read_part(checkpoint, 0, verified=verified)
