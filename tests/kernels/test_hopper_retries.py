"""Tiles that the Hopper forward computes once more: what a group reports, once, for that group."""

import random
from types import SimpleNamespace

import pytest

from ringflex.kernels import hopper_retries

GROUPS = 2
CONSTANTS = {n: getattr(hopper_retries, n).value for n in ("ISSUED", "FAILURES", "EMPTY")}


@pytest.fixture
def protocol(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The device functions, run by Python; shared memory is a list."""
    gl = SimpleNamespace(static_range=range, to_tensor=int, minimum=min)
    monkeypatch.setattr(hopper_retries, "gl", gl)
    monkeypatch.setattr(hopper_retries, "_reported", lambda failed, entry: failed[entry])
    write = lambda words, index, value, *_: words.__setitem__(index, value)
    monkeypatch.setattr(hopper_retries, "write_word", write)
    for name, value in CONSTANTS.items():
        monkeypatch.setattr(hopper_retries, name, value)
    names = ("forget", "first_reported", "next_reported", "remember")
    return SimpleNamespace(**{name: getattr(hopper_retries, name).fn for name in names})


class Program:
    """A producer and its groups, which take turns in any order.

    The producer issues a tile when the one two before is taken by both groups, and has no other way
    to know how far they are, as small tiles need no buffers that are still in use.
    """

    def __init__(self, protocol: SimpleNamespace, tiles: int, r: random.Random) -> None:
        self.protocol, self.random = protocol, r
        self.fails = {(g, t) for g in range(GROUPS) for t in range(tiles) if r.random() < 0.4}
        self.issued = [0] * (2 * CONSTANTS["ISSUED"])
        self.failed = [CONSTANTS["EMPTY"]] * (GROUPS * CONSTANTS["FAILURES"])
        self.how: list[tuple[int, str]] = []  # of each number: tile, "all", a group, or "flush"
        self.taken, self.done = [0] * GROUPS, [0] * GROUPS
        self.reports = [0] * GROUPS
        self.written: list[tuple[int, int]] = []

    def issue(self, tile: int, how: str) -> None:
        number = len(self.how)
        while min(self.taken) < number - 1:
            self.advance()
        self.protocol.remember(self.issued, number, tile, 0)
        self.how.append((tile, how))
        for _ in range(self.random.randint(0, 6)):
            self.advance()

    def advance(self) -> None:
        """A group takes the next tile, or is done with the one it took."""
        g = self.random.randrange(GROUPS)
        if self.taken[g] == self.done[g]:
            self.taken[g] += self.taken[g] < len(self.how)
            return
        number = self.done[g]
        tile, how = self.how[number]
        remembered = self.issued[number % CONSTANTS["ISSUED"] * 2]
        assert remembered == tile, "what was issued is forgotten before it is done"
        if how == "flush":
            self.reports[g] = 0
        elif how == "all" and (g, tile) in self.fails:
            assert self.reports[g] < CONSTANTS["FAILURES"] - 1, "no entry is left"
            self.failed[g * CONSTANTS["FAILURES"] + self.reports[g]] = tile
            self.reports[g] += 1
        elif how in ("all", str(g)):
            self.written.append((g, tile))
        self.done[g] += 1

    def flush(self) -> None:
        self.issue(0, "flush")
        while min(self.done) < len(self.how):
            self.advance()

    def again(self) -> None:
        """All that was reported, as the producer goes through it."""
        entry = 0
        while True:
            tile, entry = self.protocol.next_reported(self.failed, entry, GROUPS)
            if tile == CONSTANTS["EMPTY"]:
                break
            self.issue(tile, str(entry // CONSTANTS["FAILURES"]))
            entry += 1
        self.protocol.forget(self.failed, GROUPS)


@pytest.mark.parametrize("seed", range(200))
def test_every_group_writes_every_tile_once(seed: int, protocol: SimpleNamespace) -> None:
    r = random.Random(seed)
    tiles = r.randint(1, 30)
    program = Program(protocol, tiles, r)
    for tile in range(tiles):
        program.issue(tile, "all")
        reported = protocol.first_reported(program.failed, GROUPS) != CONSTANTS["EMPTY"]
        if tile == tiles - 1 or reported:
            program.flush()
            program.again()
    while min(program.done) < len(program.how):
        program.advance()
    assert sorted(program.written) == [(g, t) for g in range(GROUPS) for t in range(tiles)]
