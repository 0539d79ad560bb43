"""The stream oracle: the method, one token at a time, on transformers' models, without a cache or anything clever.

Every logit row is a forward over the whole lane. Tags are found by searching strings. Nothing is provisional: a large
token is kept, then the small model is asked at that prefix, then the next one is written. The runtime must give the
same text, ids, authors and lanes, whatever its pages, chunks, batches, flights and preemptions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from oracles.sampling import Margins, sample_row
from oracles.words import Finished, Spec, enters, locate, longest_partial, nearest, whole_characters, with_tags

from splitdecode.config import SamplingParams
from splitdecode.split.policies import HandoffPolicy, Opening
from splitdecode.split.roles import Role

SMALL, LARGE = Role.SMALL, Role.LARGE
WRITE_SMALL, WRITE_LARGE, CLOSE, CONFIRM = range(4)


@dataclass
class Oracle:
    """One answer; run() fills the fields."""

    spec: Spec
    prompts: tuple[list[int], list[int]]
    params: SamplingParams
    policy: HandoffPolicy
    key: int
    content: list[tuple[int, int]] = field(default_factory=list)  # (author, id)
    text: bytes = b""
    tag_log: list[tuple[int, int]] = field(default_factory=list)
    finish: str = ""
    cut: int | None = None
    margins: list[tuple[int, float]] | None = None  # a list here gets (content tokens so far, margin) of every draw

    def run(self) -> Oracle:
        self.lanes = [list(self.prompts[0]), list(self.prompts[1])]
        self.marks: list[set[int]] = [set(), set()]  # positions inside tags: penalties do not count them
        self.held: list[tuple[int, int]] = []  # (position, bytes already used) of small tokens not yet content
        self.attempt = (0, -1)
        self.given = [0, 0]  # content tokens each lane holds
        self.span = self.opened = 0
        try:
            if self.policy.owner(0) is LARGE and self.granted():
                self.take_over_by_position()
                self.large_turn()
            while True:
                self.small_turn()
                self.large_turn()
        except Finished as end:
            self.finish = str(end)
        return self

    # -- drawing

    def words(self, role: Role, token: int) -> bytes:
        return self.spec.tokenizers[role].token_bytes[token]

    def is_end(self, role: Role, token: int) -> bool:
        eos = () if self.params.ignore_eos else self.spec.eos[role]
        return token in eos or token in self.params.stop_ids

    def draw(self, role: Role, stream: int, position: int | None = None, step: int = 0) -> int:
        ids = self.lanes[role]
        here = len(ids) if position is None else position
        attempt = self.attempt[0] if stream == WRITE_SMALL and self.attempt[1] == len(ids) else 0
        table = self.spec.tokenizers[role].token_bytes
        margins: Margins | None = None if self.margins is None else []
        token = sample_row(
            self.spec.logits(role, ids),
            self.params,
            self.key,
            here,
            stream,
            step,
            attempt,
            vocab_limit=self.spec.vocab_limit[role],
            banned=[i for i, t in enumerate(table) if role is LARGE and any(g.encode() in t for g in self.spec.tags)],
            entering=[i for i, t in enumerate(table) if enters(t, self.spec.tags[0].encode())],
            suppress=stream in (WRITE_SMALL, WRITE_LARGE) and len(self.content) < self.params.min_tokens,
            stop_ids=[*self.spec.eos[role], *self.params.stop_ids],
            prompt_ids=self.prompts[role],
            output_ids=[t for p, t in enumerate(ids) if p >= len(self.prompts[role]) and p not in self.marks[role]],
            margins=margins,
        )
        assert token >= 0
        if self.margins is not None:
            self.margins += [(len(self.content), margin) for margin in margins or ()]
        return token

    # -- content

    def emit(self, author: Role, token: int, *, may_mark: bool = True) -> bool:
        """True: the policy's mark was reached."""
        tokenizer = self.spec.tokenizers[author]
        piece = (
            b"" if self.params.skip_special_tokens and token in tokenizer.special_ids else tokenizer.token_bytes[token]
        )
        before = self.text
        self.content.append((int(author), token))
        for length in range(1, len(piece) + 1):
            text = before + piece[:length]
            hits = [s for s in self.params.stop_strings if text.endswith(s.encode())]
            if hits and len(self.content) >= self.params.min_tokens:
                hit = max(hits, key=lambda s: len(s.encode()))
                self.text = before + piece
                self.cut = len(text) - (0 if self.params.include_stop_str_in_output else len(hit.encode()))
                raise Finished("stop")
        self.text = before + piece
        if self.params.max_tokens is not None and len(self.content) >= self.params.max_tokens:
            raise Finished("length")
        return may_mark and self.mark is not None and len(self.content) >= self.mark

    def end(self, author: Role, token: int) -> None:
        self.content.append((int(author), token))
        raise Finished("stop")

    # -- the small model writes

    def held_bytes(self) -> list[tuple[int, int, bytes]]:
        return [(p, used, self.words(SMALL, self.lanes[0][p])[used:]) for p, used in self.held]

    def release(self, count: int) -> bool:
        """The first `count` held tokens become content. True: a mark was reached; the rest is no longer held."""
        for _ in range(count):
            position, used = self.held.pop(0)
            token = self.lanes[0][position]
            self.settled = position + 1
            ids = [token] if not used else self.encode(SMALL, self.words(SMALL, token)[used:])
            for one in ids:
                if self.emit(SMALL, one):
                    return True
        return False

    def encode(self, role: Role, data: bytes) -> list[int]:
        return self.spec.tokenizers[role].encode_bytes(data) if data else []

    def scan(self) -> str:
        """Looks at what is held: '' = write on, 'open' = an opening tag, 'mark'."""
        while True:
            pieces = self.held_bytes()
            data = b"".join(piece for *_, piece in pieces)
            tags = list(enumerate(self.spec.tags))
            ends = [(e, k) for e in range(len(data) + 1) for k, t in tags if data[:e].endswith(t.encode())]
            if not ends:
                break
            end, kind = min(ends)
            begin = end - len(self.spec.tags[kind].encode())
            first, first_at = locate(pieces, begin)
            last, last_at = locate(pieces, end - 1)
            if self.release(first):
                return "mark"
            position, used, _ = pieces[first]
            pre = self.words(SMALL, self.lanes[0][position])[used : first_at + used]
            for one in self.encode(SMALL, pre):
                self.emit(SMALL, one, may_mark=False)
            self.tag_log.append((len(self.text), kind))
            last_position, last_used, piece = pieces[last]
            self.marks[0] |= set(range(position, last_position + 1))
            rest = (last_position, last_used + last_at + 1)
            self.held = ([rest] if last_at + 1 < len(piece) else []) + self.held[last - first + 1 :]
            if kind == 0 and self.policy.opening is not Opening.IGNORE:
                self.opening = (position, pre, last_position, rest[1])
                return "open"
        keep = longest_partial(data, [t.encode() for t in self.spec.tags])
        safe, count = len(data) - keep, 0
        for *_, piece in pieces:
            if len(piece) > safe:
                break
            safe -= len(piece)
            count += 1
        return "mark" if self.release(count) else ""

    def small_turn(self) -> None:
        """Writes until the large model has the pen."""
        self.mark = self.policy.next_mark(len(self.content))
        outcome = self.scan() if self.held else ""
        if not outcome and self.mark is not None and len(self.content) >= self.mark:
            outcome = "mark"
        while True:
            if outcome == "open":
                if self.policy.opening is Opening.ACCEPT and self.fits() and self.granted():
                    return self.take_over()
                outcome = self.refuse()
            if outcome == "mark":
                if self.held or self.settled < len(self.lanes[0]):
                    del self.lanes[0][self.settled :]
                    self.held = []
                if self.policy.owner(len(self.content)) is LARGE and self.granted():
                    if not self.fits():
                        raise Finished("length")
                    return self.take_over_by_position()
                self.mark = self.policy.next_mark(len(self.content))
            if len(self.lanes[0]) >= self.spec.max_len[0]:
                self.release(len(self.held))
                raise Finished("length")
            token = self.draw(SMALL, WRITE_SMALL)
            self.lanes[0].append(token)
            position = len(self.lanes[0]) - 1
            if self.is_end(SMALL, token):
                if self.release(len(self.held)):
                    outcome = "mark"
                    continue
                self.end(SMALL, token)
            self.held.append((position, 0))
            outcome = self.scan()

    def refuse(self) -> str:
        position, pre, _, _ = self.opening
        self.tag_log.pop()
        del self.lanes[0][position:]
        self.marks[0] = {p for p in self.marks[0] if p < position}
        self.lanes[0] += self.encode(SMALL, pre)
        self.held = []
        at = len(self.lanes[0])
        self.attempt = (self.attempt[0] + 1 if self.attempt[1] == at else 1, at)
        self.settled = at
        return "mark" if self.mark is not None and len(self.content) >= self.mark else ""

    def raw_text(self) -> str:
        """The text with its tags; for texts of whole characters."""
        return with_tags(self.text if self.cut is None else self.text[: self.cut], self.tag_log, self.spec.tags)

    # -- changing hands

    def tokens_left(self) -> float:
        cap = self.params.max_large_tokens
        return float("inf") if cap is None else cap - sum(author == LARGE for author, _ in self.content)

    def granted(self) -> bool:
        cap = self.params.max_offloads
        return (cap is None or self.opened < cap) and self.tokens_left() > 0

    def owed(self, role: Role) -> list[int]:
        fresh = self.content[self.given[role] :]
        if self.spec.same:
            return [token for _, token in fresh]
        return self.encode(role, b"".join(self.words(Role(a), t) for a, t in fresh))

    def fits(self) -> bool:
        return self.spec.max_len[1] - len(self.lanes[1]) > len(self.owed(LARGE))

    def take_over(self) -> None:
        _, _, last, used = self.opening
        token = self.lanes[0][last]
        if used < len(self.words(SMALL, token)):
            self.lanes[0][last:] = self.encode(SMALL, self.words(SMALL, token)[:used])
        self.marks[0] |= {last + i for i in range(len(self.lanes[0]) - last)}
        self.begin_span()

    def take_over_by_position(self) -> None:
        if self.policy.tags:
            ids = self.tag_ids(0)
            if self.spec.max_len[0] - len(self.lanes[0]) <= len(ids):
                raise Finished("length")
            self.marks[0] |= set(range(len(self.lanes[0]), len(self.lanes[0]) + len(ids)))
            self.lanes[0] += ids
            self.tag_log.append((len(self.text), 0))
        self.begin_span()

    def tag_ids(self, kind: int) -> list[int]:
        tokenizer = self.spec.tokenizers[SMALL]
        added = tokenizer.id_of(self.spec.tags[kind])
        return self.encode(SMALL, self.spec.tags[kind].encode()) if added is None else [added]

    def begin_span(self) -> None:
        self.held = []
        self.given[0] = len(self.content)
        self.lanes[1] += self.owed(LARGE)
        self.given[1] = len(self.content)
        self.span = len(self.content)
        self.opened += 1

    # -- the large model writes

    def large_turn(self) -> None:
        """Writes until the small model has the pen."""
        tagged = self.tagged = self.policy.owner(len(self.content)) is None
        self.last = self.span + self.tokens_left()
        self.mark = nearest(self.last, self.span + self.spec.max_span if tagged else self.policy.next_mark(self.span))
        if not self.policy.reads_along:
            return self.large_alone()
        waiting: list[int] = []  # tokens whose text ends inside a character: the small model cannot read them yet
        while True:
            if len(self.lanes[0]) >= self.spec.max_len[0]:
                raise Finished("length")
            if len(self.lanes[1]) >= self.spec.max_len[1]:
                return self.force()
            token = self.draw(LARGE, WRITE_LARGE)
            self.lanes[1].append(token)
            ending = self.is_end(LARGE, token)
            waiting += [] if ending else [token]
            final = ending or self.at_limit(len(waiting))
            if waiting and (self.spec.same or final or whole_characters(self.words(LARGE, t) for t in waiting)):
                if outcome := self.read(waiting, tagged):
                    return self.force() if outcome == "mark" else None
                waiting = []
            if ending:
                self.end(LARGE, token)

    def at_limit(self, waiting: int) -> bool:
        limits = [n for n in (self.params.max_tokens, self.mark if self.tagged else self.last) if n is not None]
        return any(len(self.content) + waiting >= n for n in limits) or len(self.lanes[1]) >= self.spec.max_len[1]

    def read(self, tokens: list[int], tagged: bool) -> str:
        """The small model reads a stretch of large tokens, asked at each of its prefixes: '', 'mark' or 'closed'."""
        opened = len(self.content) == self.span
        data = b"".join(self.words(LARGE, token) for token in tokens)
        ids = tokens if self.spec.same else self.encode(SMALL, data)
        if len(self.lanes[0]) + len(ids) > self.spec.max_len[0]:
            raise Finished("length")
        seen = b""
        for index, one in enumerate(ids):
            self.lanes[0].append(one)
            seen += self.words(SMALL, one)
            last = index + 1 == len(ids)
            if last:
                for count, token in enumerate(tokens, 1):
                    if self.emit(LARGE, token):
                        self.cut_at_mark(tokens[:count], len(tokens), len(ids))
                        return "mark"
                if len(self.lanes[0]) >= self.spec.max_len[0]:
                    raise Finished("length")
            if tagged and (last or not opened) and self.closes():
                if not last:
                    del self.lanes[1][-len(tokens) :]
                    residue = self.encode(LARGE, seen)
                    self.lanes[1] += residue
                    for cut in residue:
                        self.emit(LARGE, cut, may_mark=False)
                    self.given = [len(self.content)] * 2
                return "closed"
        return ""

    def cut_at_mark(self, kept: list[int], written: int, read: int) -> None:
        """A mark stands inside a stretch that was read whole: both models keep what stands before it."""
        if len(kept) < written:
            del self.lanes[1][len(kept) - written :]
            self.lanes[0][-read:] = self.encode(SMALL, b"".join(self.words(LARGE, t) for t in kept))

    def large_alone(self) -> None:
        while True:
            if len(self.lanes[1]) >= self.spec.max_len[1]:
                if self.policy.next_mark(len(self.content)) is None and self.policy.owner(len(self.content)) is LARGE:
                    raise Finished("length")
                return self.force()
            token = self.draw(LARGE, WRITE_LARGE)
            self.lanes[1].append(token)
            if self.is_end(LARGE, token):
                self.end(LARGE, token)
            if self.emit(LARGE, token):
                if self.policy.owner(len(self.content)) is LARGE and self.tokens_left() > 0:
                    self.mark = nearest(self.policy.next_mark(len(self.content)), self.last)
                    continue
                return self.force()

    def closes(self) -> bool:
        """The small model's own chance to close at this prefix."""
        close = self.spec.tags[1].encode()
        base = len(self.lanes[0])
        token = self.draw(SMALL, CLOSE)
        first = self.words(SMALL, token)
        if not enters(first, close):
            return False
        self.lanes[0].append(token)
        data = first
        while True:
            at = data.find(close)
            if at >= 0 and not self.is_end(SMALL, self.lanes[0][-1]):
                if at < len(first):
                    self.held = [(base + i, 0) for i in range(len(self.lanes[0]) - base)]
                    self.given = [len(self.content)] * 2
                    return True
                break
            if self.is_end(SMALL, self.lanes[0][-1]) or longest_partial(data, [close]) <= len(data) - len(first):
                break
            if len(self.lanes[0]) >= self.spec.max_len[0]:
                raise Finished("length")
            following = self.draw(SMALL, CONFIRM, base, len(self.lanes[0]) - base)
            self.lanes[0].append(following)
            data += self.words(SMALL, following)
        del self.lanes[0][base:]
        return False

    def force(self) -> None:
        if not self.policy.reads_along:
            owed = self.owed(SMALL)
            if len(owed) > self.spec.max_len[0] - len(self.lanes[0]):
                raise Finished("length")
            self.lanes[0] += owed
        if self.policy.tags:
            ids = self.tag_ids(1)
            if self.spec.max_len[0] - len(self.lanes[0]) < len(ids):
                raise Finished("length")
            self.held = [(len(self.lanes[0]) + i, 0) for i in range(len(ids))]
            self.lanes[0] += ids
        self.given = [len(self.content)] * 2
