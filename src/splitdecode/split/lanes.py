"""F5: the two lanes of one request, as split/sequence.py speaks of them: sizes, what is owed, cuts and texts."""

from __future__ import annotations

from splitdecode._C import Event, Scheduler
from splitdecode.split.block import Block
from splitdecode.split.roles import Role
from splitdecode.split.tokens import PairTokens

SMALL, LARGE = Role.SMALL, Role.LARGE


class Lanes:
    """One request's lanes in the scheduler, under `handle`."""

    def __init__(self, scheduler: Scheduler, tokens: PairTokens, handle: int) -> None:
        self.scheduler, self.tokens, self.handle = scheduler, tokens, handle

    def _position(self) -> int:
        return self.scheduler.content_size(self.handle)

    def _size(self, role: Role) -> int:
        return self.scheduler.size(self.handle, role)

    def _limit(self, role: Role) -> int:
        return self._size(role) + self.scheduler.room(self.handle, role)

    def _fits(self) -> bool:
        """Whether the large lane can take what it owes and one token more."""
        return self.scheduler.room(self.handle, LARGE) > len(self._owed(LARGE))

    def _owed(self, role: Role) -> list[int]:
        ids = [int(i) for i in self.scheduler.content(self.handle, self.scheduler.projected(self.handle, role))[0]]
        return self.tokens.project(role.other, ids)

    def _catch_up(self, role: Role) -> bool:
        """The lane owes what the other model wrote meanwhile; nothing runs yet. False: it does not fit."""
        ids = self._owed(role)
        if len(ids) > self.scheduler.room(self.handle, role):
            return False
        self._retarget(role, self._size(role), ids)
        self.scheduler.set_projected(self.handle, role, self._position())
        return True

    def _retarget(self, role: Role, keep: int, ids: list[int], *, in_tag: bool = False) -> None:
        self.scheduler.retarget(self.handle, role, keep, ids, in_tag)

    def _cut(self, position: int, end: int) -> list[int]:
        """The first `end` bytes of the small lane's token at `position`, as ids: the token itself where that is all."""
        whole = self._lane_bytes(SMALL, position, position + 1)
        if end == len(whole):
            return [int(i) for i in self.scheduler.lane_ids(self.handle, SMALL, position, position + 1)]
        return self.tokens.encode(SMALL, whole[:end])

    def _lane_bytes(self, role: Role, start: int, stop: int) -> bytes:
        return self.tokens.bytes_of(role, [int(i) for i in self.scheduler.lane_ids(self.handle, role, start, stop)])

    def _drop_held(self) -> None:
        """Tokens behind a mark are drawn again by whoever writes there."""
        self._retarget(SMALL, int(self.scheduler.lane_state(self.handle, SMALL)["stable"]), [])

    def _kept_ids(self, block: Block) -> list[int]:
        """What the small lane keeps of a block when only its first tokens became content."""
        tokens, ids = block.within(self._position() - block.start)
        rest = [int(i) for i in self.scheduler.content(self.handle, block.start + tokens)[0]]
        return block.ids[:ids] + (self.tokens.project(LARGE, rest) if rest else [])

    @property
    def written(self) -> bytes:
        """The answer so far, special tokens too: a reader may be spared them, a model that wrote one was not."""
        ids, authors = self.scheduler.content(self.handle)[:2]
        return b"".join(self.tokens.bytes_of(Role(a), [i]) for i, a in zip(ids.tolist(), authors.tolist(), strict=True))

    def _say(self, text: str) -> list[Event] | None:
        """Puts text into the answer in the small model's name, which holds the pen. None: it does not fit."""
        ids = self.tokens.say(text)
        if len(ids) >= self.scheduler.room(self.handle, SMALL):
            return None
        self._retarget(SMALL, self._size(SMALL), ids)
        return self.scheduler.emit(self.handle, SMALL, ids)
