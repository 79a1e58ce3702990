"""Written text → token ids, such that nothing the data wrote becomes a control token.

Harmless text gets exactly the ids of a plain tokenisation of each piece between two cuts. Where a control
token would arise from a content (`</s>` in a question), the text is cut within it: the parts are plain.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from klimb.data.template import Content, RenderError, Written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANCHORS = ("\n", ".", "a", "0")
PREFIXES = ("▁", "Ġ", " ")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids, and the character [start, end) that each comes from."""

    ids: list[int]
    spans: list[tuple[int, int]]

    def index(self, character: int) -> int:
        """Of the first token that begins at or after `character`."""
        return bisect_left(self.spans, character, key=lambda span: span[0])


class Encoder:
    """A tokenizer that reads text with cuts, and knows which ids only a template may write.

    prefix: what it puts before a text of its own accord (BOS, for some). added: literal → id of the tokens
    that it matches as a whole. special: ids of those among them which stand for no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise RenderError(
                "the tokenizer does not say which characters a token comes from", fix="use a fast one"
            )
        self._tokenizer = tokenizer
        tokens = tokenizer.added_tokens_decoder
        self.added: dict[str, int] = {
            token.content: id for id, token in tokens.items() if token.content.strip()
        }
        self.literals: dict[int, str] = {id: literal for literal, id in self.added.items()}
        special = {id for id in self.literals if tokens[id].special or id in tokenizer.all_special_ids}
        unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}
        self.special: frozenset[int] = frozenset(special - unknown)
        bare, dressed = self._read(["a"])[0].ids, tokenizer("a")["input_ids"]
        at = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
        self.prefix: list[int] = dressed[:at]
        self._adds_space = _adds_space(tokenizer)

    def encode(
        self, written: Sequence[Written], control: frozenset[int], reserved: frozenset[int]
    ) -> list[Encoded | RenderError]:
        """control: ids that no content may become; reserved: further ones that only the assistant's may."""
        cuts = [[0, *text.cuts, len(text.text)] for text in written]
        results: list[Encoded | RenderError] = []
        for text, borders, encoded in zip(written, cuts, self._read_pieces([t.text for t in written], cuts)):
            try:
                while wrong := list(self._forged(text, encoded, control, reserved)):
                    borders = sorted({*borders, *wrong})
                    encoded = next(self._read_pieces([text.text], [borders]))
                results.append(encoded)
            except RenderError as error:
                results.append(error)
        return results

    def _forged(
        self, text: Written, encoded: Encoded, control: frozenset[int], reserved: frozenset[int]
    ) -> Iterator[int]:
        """Where to cut, for each control token that contains a character of a content."""
        watched = control | reserved
        if watched.isdisjoint(encoded.ids):
            return
        for index in [index for index, id in enumerate(encoded.ids) if id in watched]:
            id, (start, end) = encoded.ids[index], encoded.spans[index]
            # Some tokens swallow the white space around them, which may be a content's.
            literal = self.literals[id]
            at = text.text.find(literal, start, end)
            start, end = (at, at + len(literal)) if at >= 0 else (start, end)
            for content in text.contents:
                if _overlaps(content, start, end) and (id in control or not content.assistant):
                    if end - start < 2:
                        raise RenderError(
                            f"{text.text[start:end]!r} in the text is a control token", fix="take it out"
                        )
                    yield start + 1
                    break

    def _read_pieces(self, texts: Sequence[str], cuts: Sequence[Sequence[int]]) -> Iterator[Encoded]:
        """Each text read in pieces, [cut, next cut) apart, in one call for all."""
        borders = [sorted(set(positions)) for positions in cuts]
        pieces = [
            (text[start:end], start)
            for text, positions in zip(texts, borders)
            for start, end in pairwise(positions)
        ]
        read = iter(self._read_each(pieces))
        for positions in borders:
            ids: list[int] = []
            spans: list[tuple[int, int]] = []
            for start, end in pairwise(positions):
                piece = next(read)
                ids += piece.ids
                spans += [(start + a, start + b) for a, b in piece.spans] if start else piece.spans
                # A token of white space alone may claim to begin where it ends.
                for index in range(len(spans) - 1, -1, -1):
                    if spans[index][0] < end:
                        break
                    spans[index] = (end - 1, end)
            yield Encoded(ids, spans)

    def _read_each(self, pieces: Sequence[tuple[str, int]]) -> list[Encoded]:
        """(piece, its place in the text) → tokens."""
        if not self._adds_space:
            return self._read([piece for piece, _ in pieces])
        plain = self._read([piece if start == 0 else ANCHORS[0] + piece for piece, start in pieces])
        return [
            read if start == 0 else self._without_anchor(piece, read)
            for (piece, start), read in zip(pieces, plain)
        ]

    def _without_anchor(self, piece: str, read: Encoded) -> Encoded:
        """A piece from within a text gets no space before it: read behind an anchor, which is taken off."""
        for anchor in ANCHORS:
            if anchor != ANCHORS[0]:
                read = self._read([anchor + piece])[0]
            alone = self._read([anchor])[0].ids
            rest = [(a - len(anchor), b - len(anchor)) for a, b in read.spans[len(alone) :]]
            if read.ids[: len(alone)] == alone and all(a >= 0 for a, _ in rest):
                return Encoded(read.ids[len(alone) :], rest)
        raise RenderError(f"the tokenizer cannot read {piece[:20]!r} without a space before it")

    def _read(self, texts: Sequence[str]) -> list[Encoded]:
        if not texts:
            return []
        backend = self._tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = False
        read = backend.encode_batch(list(texts), add_special_tokens=False)
        return [Encoded(encoding.ids, encoding.offsets) for encoding in read]

    def decode(self, ids: Sequence[int]) -> str:
        """As it would read behind other text: without what a tokenizer drops or adds at the start of one."""
        anchor = self._read([ANCHORS[1]])[0].ids if self._adds_space else []
        text: str = self._tokenizer.decode(
            [*anchor, *ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.removeprefix(ANCHORS[1]) if anchor else text


def _overlaps(content: Content, start: int, end: int) -> bool:
    return max(content.start, start) < min(content.end, end)


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Does it put a space before a text that has none, as SentencePiece does?"""
    backend = tokenizer.backend_tokenizer
    text = backend.normalizer.normalize_str("a") if backend.normalizer else "a"
    pieces = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else [(text, (0, 1))]
    return bool(pieces) and pieces[0][0].startswith(PREFIXES)
