"""Text to ids and back with a SentencePiece model, in such a way that no text can spell a control token.

SentencePiece by itself turns the text "[UNUSED_TOKEN_146]" into the id that InternLM2's chat format uses for <|im_start|>, so
a user's message could end its own turn. Here `encode(text)` gives only ids that stand for text, whatever the text spells, and
`decode(encode(text)) == text` for every text. Control tokens come only from `allowed_special` and from chat.encode_chat.
"""

import io
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece

from internlm2.storage import atomic_file

CHAT_SPECIALS = ("<|im_start|>", "<|im_end|>", "<|action_start|>", "<|action_end|>", "<|interpreter|>", "<|plugin|>")
# The released model has spare pieces; its chat format gives some of them these meanings.
_RELEASED_NAMES = {
    **{name: f"[UNUSED_TOKEN_{146 - i}]" for i, name in enumerate(CHAT_SPECIALS)},
    "<|reward|>": "[UNUSED_TOKEN_130]",
}
_SPACE = "▁"  # SentencePiece writes a space as this character, so the character itself would be decoded as a space
_PROBE = "  a\tb\n\nc  ▁ Ａ… é\u0301\u200b 𝄞\0 "


class Tokenizer:
    """A SentencePiece model from a file.

    vocab_size, bos_id, eos_id: those of the SentencePiece model
    specials:                   name -> id of every control token: <s>, </s>, the chat tokens under the names that the chat
                                format gives them, spare and unknown pieces under their own names
    Errors: ValueError where sentencepiece cannot load the file, or where the model cannot give every text back exactly (it
            needs byte fallback, an identity normaliser and no dummy prefix)
    """

    def __init__(self, path: str | Path):
        data = Path(path).read_bytes()
        if hasattr(sentencepiece, "set_min_log_level"):
            sentencepiece.set_min_log_level(2)  # only errors: it warns about the null character's piece in the released model
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise ValueError(_not_loaded(path, error)) from error
        sp = self._sp
        self.vocab_size, self.bos_id, self.eos_id = sp.vocab_size(), sp.bos_id(), sp.eos_id()
        self._byte_ids = {sp.id_to_piece(i): i for i in range(self.vocab_size) if sp.is_byte(i)}
        if len(self._byte_ids) != 256 or self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{path} must have <s>, </s> and byte fallback, got {len(self._byte_ids)} byte pieces")
        # {text: ids that it gets here, in place of those of SentencePiece}. Versions of SentencePiece disagree about the piece
        # of the null character: up to 0.2.1 it is an ordinary piece, and the released model was trained with it; from 0.2.3 on
        # it is never used.
        self._fixed_ids = {_SPACE: [self._byte_ids[f"<0x{b:02X}>"] for b in _SPACE.encode()]}
        self._fixed_ids |= {piece: [i] for i in range(self.vocab_size) if (piece := sp.id_to_piece(i)) == "\0"}
        pieces = {sp.id_to_piece(i): i for i in range(self.vocab_size) if _reserved(sp, i)}
        names = {piece: name for name, piece in _RELEASED_NAMES.items()}
        self.specials = {names.get(piece, piece): i for piece, i in pieces.items()}
        self._special_names = {i: name for name, i in self.specials.items()}
        # Matches everything in a text that SentencePiece would not treat as ordinary text.
        self._spellings = re.compile("|".join(map(re.escape, sorted({*pieces, *self._fixed_ids}, key=len, reverse=True))))
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ValueError(f"{path} must give text back exactly: identity normaliser, no dummy prefix, all spaces kept")

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, allowed_special: Collection[str] | Literal["all"] = ()
    ) -> list[int]:
        """Ids of `text`. A name of `specials` that occurs in the text becomes its id only if `allowed_special` lists the name.

        ValueError for a name that is not in specials, and for a text that is not valid Unicode (a lone surrogate).
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text must be valid Unicode, got a lone surrogate at index {error.start}") from None
        allowed = self.specials if allowed_special == "all" else allowed_special
        unknown = [name for name in allowed if name not in self.specials]
        if isinstance(allowed, str) or unknown:
            raise ValueError(f"allowed_special must be 'all' or names of this tokenizer's specials, got {allowed_special!r}")
        ids = [self.bos_id] if bos else []
        if allowed:
            for part in re.split(f"({'|'.join(map(re.escape, sorted(allowed, key=len, reverse=True)))})", text):
                ids += [self.specials[part]] if part in allowed else self._encode_text(part)
        else:
            ids += self._encode_text(text)
        return ids + [self.eos_id] if eos else ids

    def _encode_text(self, text: str) -> list[int]:
        """Ids that stand for text, without control tokens. Where the text spells a reserved piece, it is cut after the first
        character of the piece, so that SentencePiece does not recognise it; ▁ and the null character get fixed ids."""
        ids: list[int] = []
        start, match = 0, self._spellings.search(text)
        while match:
            at = match.start()
            if match.group() in self._fixed_ids:
                ids += self._sp.encode(text[start:at]) + self._fixed_ids[match.group()]
            else:
                ids += self._sp.encode(text[start : at + 1])
            start = at + 1
            match = self._spellings.search(text, at + 1)
        return ids + self._sp.encode(text[start:])

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of ids. Control tokens become their names, or are left out with skip_special; bytes that are not UTF-8
        become U+FFFD. ValueError for an id out of range."""
        parts: list[str] = []
        run: list[int] = []
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"ids must lie in [0, vocab_size = {self.vocab_size}), got {i}")
            if i not in self._special_names:
                run.append(int(i))
                continue
            parts.append(self._sp.decode(run))
            run = []
            if not skip_special:
                parts.append(self._special_names[i])
        return "".join([*parts, self._sp.decode(run)])


def _not_loaded(path: str | Path, error: RuntimeError) -> str:
    version = getattr(sentencepiece, "__version__", "of an unknown version")
    message = f"sentencepiece {version} cannot load {path}: {error}"
    if "null character" in str(error):
        return f"{message} The released InternLM2 model has such a piece, and 0.2.2 alone refuses it: install 0.2.3 or 0.2.1."
    return f"{message} The file is damaged, or it is not a SentencePiece model."


def _reserved(sp: sentencepiece.SentencePieceProcessor, i: int) -> bool:
    """Whether piece i is reserved: it has a meaning other than its text.

    Reserved are control, unknown and unused pieces. Of the user-defined pieces, which SentencePiece matches before all others
    (their score is 0, that of merges is negative), those of the form [NAME] or <name> are reserved. The other user-defined
    pieces are text: in the released model they are full-width letters and dashes, for example.
    """
    piece = sp.id_to_piece(i)
    if piece == "\0":
        return False
    if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
        return True
    return not sp.is_byte(i) and sp.get_score(i) == 0.0 and re.fullmatch(r"\[\S+\]|<\S+>", piece) is not None


def train_bpe(
    texts: Iterable[str], vocab_size: int, path: str | Path, *, specials: Sequence[str] = CHAT_SPECIALS, threads: int = 2
) -> Tokenizer:
    """Trains a byte-pair tokenizer on `texts`, with the settings of InternLM2's tokenizer, and writes it to `path`.

    The tokenizer has byte fallback and a piece for each digit, and keeps every space; `specials` become control tokens. Equal
    texts give an equal file. Long texts are cut at the first line break after every 4,000 characters, because SentencePiece
    leaves out texts that are longer than its limit.
    ValueError where the texts hold too little for vocab_size.
    """
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts), model_writer=buffer, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, split_digits=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, character_coverage=0.9999,
            max_sentence_length=1 << 20, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, control_symbols=list(specials),
            num_threads=threads, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of vocab_size {vocab_size} can be trained on these texts: {error}") from error
    with atomic_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return Tokenizer(path)


def _sentences(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        while len(text) > 4000 and (cut := text.find("\n", 4000) + 1):
            yield text[:cut]
            text = text[cut:]
        yield text
