"""Written text → token ids, such that nothing the data wrote becomes a control token.

Harmless text gets exactly the ids of a plain tokenisation of each piece between two cuts. Where a control
token would arise from a content (`</s>` in a question), the text is cut within it: the parts are plain.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence, Set
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from klimb.data.template import RenderError, Written

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

ANCHORS = ("\n", ".", "a", "0")
PREFIXES = ("▁", "Ġ", " ")


class Piece(NamedTuple):
    """Characters [start, end) of a text, read apart: all but the first `skip` tokens of `encoding`.

    base: what turns the encoding's offsets into characters of the text.
    """

    encoding: Encoding
    start: int
    end: int
    skip: int = 0
    base: int = 0

    def spans(self) -> list[tuple[int, int]]:
        return [(self.base + a, self.base + b) for a, b in self.encoding.offsets[self.skip :]]


class Encoded:
    """The ids of a text, and where in it they come from.

    again: reads the text once more, where the tokenizer was not asked for its offsets.
    """

    def __init__(self, pieces: Sequence[Piece], again: Callable[[], Encoded] | None = None) -> None:
        self._pieces, self._again = pieces, again
        self._borders: dict[int, int] = {}
        self.ids: list[int] = []
        for piece in pieces:
            self._borders[piece.start] = len(self.ids)
            self.ids += piece.encoding.ids[piece.skip :] if piece.skip else piece.encoding.ids
            self._borders[piece.end] = len(self.ids)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """The characters [start, end) of each token."""
        if self._again is not None:
            return self._again().spans
        return [span for piece in self._pieces for span in piece.spans()]

    def index(self, character: int) -> int:
        """Of the first token that begins at or after `character`."""
        if character in self._borders:
            return self._borders[character]
        return bisect_left(self.spans, character, key=lambda span: span[0])


class Encoder:
    """A tokenizer that reads text with cuts, and knows which ids only a template may write.

    prefix: what it puts before a text of its own accord (BOS, for some). added: literal → id of the tokens
    that it matches as a whole. special: ids of those among them which stand for no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise RenderError("the tokenizer does not say which characters a token comes from", fix="use a fast one")
        self._tokenizer = tokenizer
        tokens = tokenizer.added_tokens_decoder
        self.added: dict[str, int] = {token.content: id for id, token in tokens.items() if token.content.strip()}
        self.literals: dict[int, str] = {id: literal for literal, id in self.added.items()}
        special = {id for id in self.literals if tokens[id].special or id in tokenizer.all_special_ids}
        unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}
        self.special: frozenset[int] = frozenset(special - unknown)
        known = self._readable(["a", "0", *tokenizer.get_vocab()])
        bare, dressed = self._read([known])[0].ids, tokenizer(known)["input_ids"]
        at = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
        self.prefix: list[int] = dressed[:at]
        self._adds_space = _adds_space(tokenizer)

    def encode(
        self, written: Sequence[Written], control: frozenset[int], reserved: frozenset[int], offsets: bool
    ) -> list[Encoded | RenderError]:
        """control: ids that no content may become; reserved: further ones that only the assistant's may.

        offsets: they will be asked for, as where a template's control tokens stand between contents.
        """
        cuts = [{0, *text.cuts, len(text.text)} for text in written]
        read = self._attempt_all([text.text for text in written], cuts, offsets or self._adds_space)
        return [self._mended(*each, control, reserved) for each in zip(written, cuts, read)]

    def _readable(self, texts: Sequence[str]) -> str:
        """The first of these that the tokenizer can read: one of words may know few."""
        for text in texts:
            with contextlib.suppress(Exception):  # tokenizers raises nothing narrower
                if self._read([text])[0].ids:
                    return text
        raise RenderError("the tokenizer reads nothing at all")

    def _attempt_all(
        self, texts: Sequence[str], cuts: Sequence[set[int]], offsets: bool
    ) -> list[Encoded | RenderError]:
        """As `_read_all`, with an error in the place of each text that the tokenizer cannot read."""
        try:
            return self._read_all(texts, cuts, offsets)
        except Exception as error:  # tokenizers raises nothing narrower
            if len(texts) == 1:
                return [RenderError("the tokenizer cannot read this text", why=error)]
            return [self._attempt_all([text], [cut], offsets)[0] for text, cut in zip(texts, cuts)]

    def _mended(
        self,
        text: Written,
        cuts: set[int],
        read: Encoded | RenderError,
        control: frozenset[int],
        reserved: frozenset[int],
    ) -> Encoded | RenderError:
        """Cut further until no control token is forged."""
        while isinstance(read, Encoded) and (forged := list(self._forged(text, read, control, reserved))):
            further = {start + 1 for start, end in forged if end - start > 1} - cuts
            if not further:
                start, end = forged[0]
                return RenderError(f"{text.text[start:end]!r} in the text is a control token", fix="take it out")
            cuts = cuts | further
            read = self._read_all([text.text], [cuts])[0]
        return read

    def _forged(
        self, text: Written, encoded: Encoded, control: frozenset[int], reserved: frozenset[int]
    ) -> Iterator[tuple[int, int]]:
        """The characters of each control token that has one of a content."""
        watched = control | reserved
        if watched.isdisjoint(encoded.ids):
            return
        for index in [index for index, id in enumerate(encoded.ids) if id in watched]:
            id, (start, end) = encoded.ids[index], encoded.spans[index]
            # Some tokens swallow the white space around them, which may be a content's.
            literal = self.literals[id]
            at = text.text.find(literal, start, end)
            start, end = (at, at + len(literal)) if at >= 0 else (start, end)
            if any(
                max(content.start, start) < min(content.end, end) and (id in control or not content.assistant)
                for content in text.contents
            ):
                yield start, end

    def _read_all(
        self, texts: Sequence[str], cuts: Sequence[Set[int]], offsets: bool = True
    ) -> list[Encoded | RenderError]:
        """Each text read in pieces, from cut to cut, in one call for all; a quarter faster without offsets."""
        borders = [list(pairwise(sorted(positions))) for positions in cuts]
        spans = [(text, *span) for text, pairs in zip(texts, borders) for span in pairs]
        anchors = ["" if start == 0 or not self._adds_space else ANCHORS[0] for _, start, _ in spans]
        read = self._read([anchor + text[start:end] for anchor, (text, start, end) in zip(anchors, spans)], offsets)
        pieces = (
            self._without_anchor(*span, encoding) if anchor else Piece(encoding, *span[1:], base=span[1])
            for encoding, anchor, span in zip(read, anchors, spans)
        )
        again = [None if offsets else partial(self._reread, *each) for each in zip(texts, cuts)]
        return [_joined([next(pieces) for _ in pairs], each) for pairs, each in zip(borders, again)]

    def _reread(self, text: str, cuts: Set[int]) -> Encoded:
        [read] = self._read_all([text], [cuts])
        assert isinstance(read, Encoded)  # it could be read before
        return read

    def _without_anchor(self, text: str, start: int, end: int, read: Encoding) -> Piece | RenderError:
        """A piece from within a text gets no space before it: read behind an anchor, which is taken off."""
        for anchor in ANCHORS:
            if anchor != ANCHORS[0]:
                [read] = self._read([anchor + text[start:end]])
            [alone] = self._read([anchor])
            skip = len(alone.ids)
            if read.ids[:skip] == alone.ids and all(a >= len(anchor) for a, _ in read.offsets[skip:]):
                return Piece(read, start, end, skip, start - len(anchor))
        return RenderError(f"the tokenizer puts a space before {text[start:end][:20]!r} that is not there")

    def _read(self, texts: Sequence[str], offsets: bool = True) -> list[Encoding]:
        backend = self._tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = False
        read = backend.encode_batch if offsets else backend.encode_batch_fast
        return read(list(texts), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """As it would read behind other text: without what a tokenizer drops or adds at the start of one."""
        anchor = self._read([ANCHORS[1]])[0].ids if self._adds_space else []
        text: str = self._tokenizer.decode(
            [*anchor, *ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.removeprefix(ANCHORS[1]) if anchor else text


def _joined(pieces: list[Piece | RenderError], again: Callable[[], Encoded] | None) -> Encoded | RenderError:
    errors = [piece for piece in pieces if isinstance(piece, RenderError)]
    return errors[0] if errors else Encoded([piece for piece in pieces if isinstance(piece, Piece)], again)


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Does it put a space before a text that has none, as SentencePiece does?"""
    backend = tokenizer.backend_tokenizer
    text = backend.normalizer.normalize_str("a") if backend.normalizer else "a"
    pieces = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else [(text, (0, 1))]
    return bool(pieces) and pieces[0][0].startswith(PREFIXES)
