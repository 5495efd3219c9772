"""Which operator of a network runs beside which: the schedule by itself, and that of whole networks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_capture import RecordingLanes
from torch import Tensor, nn

import fastcnn
from fastcnn.graph.freezing.gpu.accesses import Region, region_of, whole_storage
from fastcnn.graph.freezing.gpu.schedule import Place, Schedule, Step
from fastcnn.graph.freezing.gpu.watching import CannotBeCaptured, Watching

MEMORY = [Region(100 * i, 100 * i + 100) for i in range(8)]


def program(*operators: tuple[list[int], list[int]], most: int = 4) -> tuple[Schedule, list[Step]]:
    """A schedule of operators, each by the numbers of what it reads and what it writes."""
    schedule = Schedule(most)
    steps = [schedule.add([MEMORY[i] for i in r], [MEMORY[i] for i in w]) for r, w in operators]
    return schedule, steps


def test_a_chain_stays_in_one_lane() -> None:
    schedule, steps = program(([0], [1]), ([1], [2]), ([2], [3]))
    assert schedule.lanes == 1
    assert all(not step.waits for step in steps)
    assert schedule.ends() == []


def test_branches_have_lanes_of_their_own_and_meet_again() -> None:
    # A residual block: the shortcut 1 of 0, the chain 2, 3 of 0, and their sum.
    schedule, steps = program(([7], [0]), ([0], [1]), ([0], [2]), ([2], [3]), ([1, 3], [4]))
    lanes = [step.place.lane for step in steps]
    assert lanes[1] != lanes[2] == lanes[3]
    assert steps[2].waits == (steps[0].place,)
    assert steps[3].waits == ()
    assert steps[4].waits == (steps[1].place,)
    assert steps[4].place.lane == lanes[3]
    assert schedule.ends() == [Place(lanes[3], 3)]


def test_no_more_lanes_than_allowed() -> None:
    branches = [([0], [i]) for i in range(1, 7)]
    for most in (1, 2, 3):
        schedule, _ = program(([7], [0]), *branches, most=most)
        assert schedule.lanes == most
    with pytest.raises(ValueError, match="most must be at least 1"):
        Schedule(0)


def test_a_lane_that_is_free_is_used_again() -> None:
    block = [([0], [1]), ([0], [2]), ([1, 2], [0])]
    schedule, _ = program(([7], [0]), *block, *block, *block)
    assert schedule.lanes == 2


def test_memory_given_back_is_waited_for() -> None:
    """A tensor made in lane 0 where another lay: who reads it elsewhere follows what lane 0 did before."""
    for reused, waits in ((True, True), (False, False)):
        schedule, (_, second, _) = program(([7], [0]), ([0], [1]), ([0], [2]))
        assert second.place == Place(0, 2)
        if reused:
            schedule.made(0, MEMORY[5])
        step = schedule.add([MEMORY[2]], [MEMORY[5]])
        assert step.place.lane == 1
        assert (second.place in step.waits) == waits


regions = st.lists(st.integers(0, 5), max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(regions, st.lists(st.integers(0, 5), max_size=2)), max_size=14), st.integers(1, 4))
def test_what_touches_the_same_memory_is_in_order(operators: list[tuple[list[int], list[int]]], most: int) -> None:
    schedule, steps = program(*operators, most=most)
    lanes = RecordingLanes()
    lanes.steps = steps
    precedes = lanes.precedes(schedule)
    for j, (reads, writes) in enumerate(operators):
        assert steps[j].place.lane < most
        assert precedes(Place(0, 0), steps[j].place), "it must begin after the capture has"
        for i, (earlier_reads, earlier_writes) in enumerate(operators[:j]):
            if set(writes) & {*earlier_reads, *earlier_writes} or set(reads) & set(earlier_writes):
                assert precedes(steps[i].place, steps[j].place), (i, j)
    lane_0 = [step.place for step in steps if step.place.lane == 0]
    ended = [*lane_0[-1:], *schedule.ends()]  # what the end of lane 0 follows
    for step in steps:
        assert step.place in ended or any(precedes(step.place, end) for end in ended)


# ---- memory ----------------------------------------------------------------------------------------------------------


def bytes_of(tensor: Tensor) -> set[int]:
    """Addresses of all bytes of a tensor's values."""
    found = {tensor.data_ptr()}
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = {a + i * stride * tensor.element_size() for a in found for i in range(size)}
    return {a + i for a in found for i in range(tensor.element_size())} if tensor.numel() else set()


@st.composite
def two_views(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    buffer = torch.zeros(2, 8, 3, 2, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)

    def view() -> Tensor:
        begin = draw(st.integers(0, 8))
        width = draw(st.integers(0, 8 - begin))
        image = draw(st.integers(0, 2))
        return buffer[image:, begin : begin + width] if draw(st.booleans()) else buffer[image:]

    return view(), view()


@settings(max_examples=300, deadline=None)
@given(two_views())
def test_regions_meet_where_bytes_do(views: tuple[Tensor, Tensor]) -> None:
    a, b = views
    shared = bool(bytes_of(a) & bytes_of(b))
    assert region_of(a).meets(region_of(b)) == region_of(b).meets(region_of(a))
    assert region_of(a).meets(region_of(b)) or not shared
    if a.shape[0] == b.shape[0] == 2:  # whole slices of one buffer are told apart
        assert region_of(a).meets(region_of(b)) == shared


def test_a_storage_is_all_of_its_memory() -> None:
    buffer = torch.zeros(4, 4)
    assert whole_storage(buffer[1:, 2]) == region_of(buffer) == Region(buffer.data_ptr(), buffer.data_ptr() + 64)


# ---- networks --------------------------------------------------------------------------------------------------------


class Observed(Schedule):
    """Remembers what each operator touched."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.touched: list[tuple[list[Region], list[Region], Place]] = []

    def add(self, reads, writes) -> Step:
        step = super().add(reads, writes)
        self.touched.append((list(reads), list(writes), step.place))
        return step

    def made(self, lane: int, region: Region) -> None:
        super().made(lane, region)
        if self.touched and self.touched[-1][2].lane == lane:
            self.touched[-1][1].append(region)


@torch.no_grad()
def watched(model: nn.Module, x: Tensor, most: int = 4) -> tuple[Observed, RecordingLanes, Tensor]:
    schedule, lanes = Observed(most), RecordingLanes()
    with Watching(x.device, schedule, lanes):
        result = model(x)
    return schedule, lanes, result


@pytest.mark.parametrize(
    ("name", "most_lanes"), [("googlenet", 4), ("resnet18", 4), ("densenet_bc100_k12_cifar", 4), ("googlenet", 2)]
)
def test_networks_keep_their_order(name: str, most_lanes: int) -> None:
    model = fastcnn.create_model(name).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
    schedule, lanes, result = watched(model, x, most_lanes)
    assert torch.equal(result, expected)
    assert schedule.lanes == {"densenet_bc100_k12_cifar": 1, "resnet18": 2}.get(name, min(3, most_lanes))
    precedes = lanes.precedes(schedule)
    pairs = 0
    for j, (reads, writes, place) in enumerate(schedule.touched):
        for earlier_reads, earlier_writes, earlier in schedule.touched[:j]:
            if any(a.meets(b) for a in writes for b in (*earlier_reads, *earlier_writes)) or any(
                a.meets(b) for a in reads for b in earlier_writes
            ):
                assert precedes(earlier, place)
                pairs += 1
    assert pairs > 10
    if schedule.lanes > 1:
        assert lanes.shared, "memory that crosses lanes must be held"


def test_inception_branches_are_side_by_side() -> None:
    model = fastcnn.nn.Inception(16, 8, 8, 8, 8, 8, 8).eval()
    x = torch.randn(1, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        model(x)  # folded batch norms and the merged weight are made here
    schedule, lanes, _ = watched(model, x)
    precedes = lanes.precedes(schedule)
    merged, three, five, pooled, projected = (place for _, _, place in schedule.touched)
    assert precedes(merged, three)
    assert precedes(merged, five)
    assert precedes(pooled, projected)
    for a, b in ((three, five), (three, projected), (five, projected), (merged, pooled), (merged, projected)):
        assert not precedes(a, b)
        assert not precedes(b, a)


def test_a_chain_of_views_has_no_branches() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Unflatten(1, (4, 36)), nn.Linear(36, 5)).eval()
    schedule, lanes, _ = watched(model, torch.randn(2, 3, 8, 8))
    assert schedule.lanes == 1
    assert all(not step.waits for step in lanes.steps)
    assert all(a.place.number + 1 == b.place.number for a, b in pairwise(lanes.steps))


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: x * x.sum().item(), "_local_scalar_dense"),
        (lambda x: x if x.sum() > 0 else -x, "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], r"index\.Tensor"),
        (lambda x: torch.masked_select(x, x > 0), "masked_select"),
        (lambda x: x.to("meta"), "copies between cpu and meta"),
    ],
)
def test_what_waits_for_values_is_refused(function, operator: str) -> None:
    with pytest.raises(CannotBeCaptured, match=operator), Watching(torch.device("cpu")):
        function(torch.randn(3, 4))


def test_indices_that_are_numbers_are_not() -> None:
    with Watching(torch.device("cpu")):
        assert torch.randn(3, 4)[torch.tensor([0, 2])].shape == (2, 4)
