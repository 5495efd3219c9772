"""Which operator runs in which lane, and what it waits for: branches of a network side by side.

A lane is a stream: what is in one lane runs in order. Operators come one by one, in the program's order. Each must come
after those before it that wrote what it reads or writes, and after those that read what it writes. It goes into a lane
of which all the work must precede it anyway, preferably where the last of that work is; where there is none, into a new
lane; and where there may be no more, behind the last it depends on. So a chain stays in one lane, and a second
reader of a value, with nothing between them, gets a lane of its own.

What precedes an operator is kept as a clock: of each lane, how many of its operators are known to be done. An operator
waits only for what its lane does not wait for already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from fastcnn.graph.freezing.gpu.accesses import Region

Clock = tuple[int, ...]


class Place(NamedTuple):
    """An operator's place in the schedule. In each lane operators are numbered from 1; 0 is the beginning of all."""

    lane: int
    number: int


class Step(NamedTuple):
    """Where an operator runs, and the operators of other lanes that it waits for."""

    place: Place
    waits: tuple[Place, ...]


class _Accesses:
    """Who touched which memory."""

    def __init__(self) -> None:
        self._all: list[tuple[Region, Place]] = []

    def add(self, regions: Iterable[Region], place: Place) -> None:
        self._all += [(region, place) for region in regions]

    def meeting(self, region: Region) -> Iterator[Place]:
        start, end = region.start, region.end
        for other, place in self._all:
            if other.start < end and start < other.end and region.meets(other):
                yield place


class Schedule:
    """Gives lanes to operators, ``most`` at most. Lane 0 is where the work begins and ends."""

    def __init__(self, most: int) -> None:
        if most < 1:
            raise ValueError(f"most must be at least 1, is {most}")
        self._most = most
        self._counts = [0]  # operators in each lane
        self._known: list[Clock] = [(0,) * most]  # what each lane has waited for
        self._clocks: dict[Place, Clock] = {Place(0, 0): (0,) * most}
        self._order: dict[Place, int] = {Place(0, 0): 0}  # in the program
        self._readers, self._writers = _Accesses(), _Accesses()
        self._latest = 0  # the lane of the last operator

    @property
    def lanes(self) -> int:
        """Lanes in use."""
        return len(self._counts)

    @property
    def latest(self) -> int:
        """The lane of the last operator: where memory is best allocated."""
        return self._latest

    def add(self, reads: Sequence[Region], writes: Sequence[Region]) -> Step:
        """The program's next operator, by the memory it reads and writes; what it allocates is for :meth:`made`."""
        before = {place for region in (*reads, *writes) for place in self._writers.meeting(region)}
        before |= {place for region in writes for place in self._readers.meeting(region)}
        before = before or {Place(0, 0)}
        wanted = (0,) * self._most
        for place in before:
            wanted = _joined(wanted, self._clocks[place])
        last = max(before, key=self._order.__getitem__)
        lane = self._lane(wanted, last)
        waits: list[Place] = []
        clock = self._known[lane]
        for place in sorted(before, key=self._order.__getitem__, reverse=True):
            if place.lane != lane and place.number > clock[place.lane]:
                waits.append(place)
                clock = _joined(clock, self._clocks[place])
        self._counts[lane] += 1
        place = Place(lane, self._counts[lane])
        clock = _joined(clock, tuple(place.number if i == lane else 0 for i in range(self._most)))
        self._known[lane] = self._clocks[place] = clock
        self._order[place] = len(self._order)
        self._readers.add(reads, place)
        self._writers.add(writes, place)
        self._latest = lane
        return Step(place, tuple(waits))

    def made(self, lane: int, region: Region) -> None:
        """Memory was allocated in a lane. It may have served others before, which only that lane is known to follow."""
        self._writers.add([region], Place(lane, self._counts[lane]))

    def ends(self) -> list[Place]:
        """What lane 0 must wait for in the end: the last operators of the other lanes."""
        known = self._known[0]
        return [Place(i, count) for i, count in enumerate(self._counts) if i > 0 and count > known[i]]

    def _lane(self, wanted: Clock, last: Place) -> int:
        done = [i for i, count in enumerate(self._counts) if count <= wanted[i]]
        if last.lane in done:
            return last.lane
        if done:
            return done[0]
        if len(self._counts) < self._most:
            self._counts.append(0)
            self._known.append((-1,) + (0,) * (self._most - 1))  # it does not even know that the work has begun
            return len(self._counts) - 1
        return last.lane


def _joined(a: Clock, b: Clock) -> Clock:
    return tuple(map(max, a, b))
