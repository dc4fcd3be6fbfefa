"""What holds in a coordinator between any two events."""

from __future__ import annotations

from scpl_dist.coordinator.item_flow import ItemFlow
from scpl_dist.coordinator.machine import Coordinator
from scpl_dist.coordinator.pending_checkpoints import PendingCheckpoints


def check(coordinator: Coordinator) -> None:
    members = coordinator.members
    flow = coordinator.flow
    for rank, member in members.items():
        assert coordinator.layout.rank(*member.place) == rank
    assert len({member.peer for member in members.values()}) == len(members)
    assert all(coordinator.present[peer].peer == peer for peer in coordinator.present)
    assert (coordinator.state == "over") == (coordinator.outcome is not None)
    if coordinator.state == "over":  # a failure may end an event halfway
        return
    state = coordinator.state
    if state == "regrouping":  # whoever is still there may be free, and nobody else counts
        assert flow is not None
        assert not any(member.leaving and member.free for member in coordinator.present.values())
        return
    complete = len(members) == coordinator.layout.world
    together = state in ("preparing", "joining", "running")
    assert (flow is not None) == together
    if flow is not None:
        assert complete
        assert (coordinator._lost is None) or state != "running"
        assert not coordinator._commits or state == "running"  # what is being published is waited for
        assert all(coordinator.present.get(member.peer) is member for member in members.values())
        assert not any(member.free for member in members.values())
        assert all(member.built for member in members.values()) == (state != "preparing")
        ready = all(member.ready for member in members.values())
        assert (flow.begun is not None) == ready == (state == "running")
        check_flow(flow, [member.done for member in members.values()])
        check_checkpoints(flow.checkpoints)


def check_flow(flow: ItemFlow, finished: list[int]) -> None:
    """`finished` are the last items that each worker has finished."""
    window = flow.window
    assert list(window.open) == list(range(min(finished) + 1, window._sent))
    assert max(finished) < window._sent
    assert window._begun < window._sent
    assert flow.results.steps_done <= flow.sequence.position["step"]


def check_checkpoints(pending: PendingCheckpoints) -> None:
    for parts in pending._parts.values():
        assert parts.files.keys() | parts.copied.keys() <= set(range(pending._stages))
        assert parts.files.keys() <= pending._writers
        assert parts.ready is None or len(parts.copied) == pending._stages
