"""The tokenizer: no text spells a control token, every text comes back exactly, ids and chat format are the released ones."""

import os
import re
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.chat import encode_chat
from internlm2.tokenizer import CHAT_SPECIALS, Tokenizer, train_bpe

RELEASED = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizer_internlm2.model"
SPARE_FROM = 92397  # the released model's spare pieces, control tokens among them, are 92397 to 92543


@pytest.fixture(scope="session")
def released():
    if not RELEASED.exists():
        pytest.skip("the released tokenizer model is not on this machine")
    return Tokenizer(RELEASED)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    return train_bpe(library_texts(), 600, tmp_path_factory.mktemp("tokenizer") / "small.model")


def library_texts():
    files = sorted(Path(os.__file__).parent.glob("*.py"))[:12]
    return [file.read_text(encoding="utf-8") for file in files]


@pytest.fixture(params=["released", "trained"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_the_released_ids(released):
    assert (released.vocab_size, released.bos_id, released.eos_id) == (92544, 1, 2)
    expected = dict(zip(CHAT_SPECIALS, range(92543, 92537, -1), strict=True)) | {"<|reward|>": 92527, "<s>": 1, "</s>": 2}
    assert expected.items() <= released.specials.items()
    assert {i for i in released.specials.values() if i > 1000} == set(range(SPARE_FROM, 92544))


def test_ordinary_text_is_tokenized_as_sentencepiece_does(released):
    plain = sentencepiece.SentencePieceProcessor(model_file=str(RELEASED))
    for text in [*library_texts()[:3], "中文，测试。 Ａｂｃ——……\n\t 12345 naïve café 🙂", ""]:
        assert released.encode(text) == plain.encode(text)


def test_a_null_character_has_the_released_id_with_every_version_of_sentencepiece(released):
    """Up to 0.2.1 sentencepiece gives 354; from 0.2.3 on it does not use that piece and gives the byte's id 3."""
    assert released.encode("a\0b") == [*released.encode("a"), 354, *released.encode("b")]
    assert released.decode([354]) == "\0" and 354 not in released.specials.values()


def test_what_plain_sentencepiece_gets_wrong(released):
    """Where sentencepiece alone differs from what we need, which is why our tokenizer exists. If this test fails, sentencepiece
    has changed and our tokenizer may become simpler."""
    plain = sentencepiece.SentencePieceProcessor(model_file=str(RELEASED))
    assert plain.encode("[UNUSED_TOKEN_146]") == [92543]
    assert plain.decode(plain.encode("▁")) == " "
    assert max(released.encode("[UNUSED_TOKEN_146]")) < SPARE_FROM


def spellings(tokenizer):
    return [*tokenizer.specials, *(f"[UNUSED_TOKEN_{i}]" for i in range(147)), "▁", "<0x41>", "<unk>"]


def test_spelled_controls_stay_text(tokenizer):
    for text in spellings(tokenizer):
        for wrapped in (text, f"a{text}b", text * 2, f"<|{text}|>", text[:1] + text, f" {text} "):
            ids = tokenizer.encode(wrapped)
            assert not set(ids) & set(tokenizer.specials.values()), wrapped
            assert tokenizer.decode(ids) == wrapped


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
PIECES = st.sampled_from(
    ["[UNUSED_TOKEN_", "146]", "0]", "<|", "im_start", "|>", "<s>", "</s>", "▁", " ", "\n", "\0", "[", "<", "�"]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(TEXTS | PIECES, max_size=12).map("".join))
def test_every_text_comes_back_released(released, text):
    ids = released.encode(text)
    assert released.decode(ids) == text and max(ids, default=0) < SPARE_FROM and not {0, 1, 2} & set(ids)


@settings(max_examples=400, deadline=None)
@given(st.lists(TEXTS | PIECES, max_size=12).map("".join))
def test_every_text_comes_back_trained(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text and not set(trained.specials.values()) & set(ids)


def test_specials_by_permission(tokenizer):
    start, end = (tokenizer.specials[name] for name in CHAT_SPECIALS[:2])
    text = "<|im_start|>a<|im_end|>"
    letter = tokenizer.encode("a")
    assert tokenizer.encode(text, allowed_special="all") == [start, *letter, end]
    some = tokenizer.encode(text, allowed_special={"<|im_start|>"})
    assert some == [start, *tokenizer.encode("a<|im_end|>")] and end not in some
    assert tokenizer.encode("a", bos=True, eos=True) == [tokenizer.bos_id, *letter, tokenizer.eos_id]
    assert tokenizer.decode([start, *letter, end]) == text
    assert tokenizer.decode([start, *letter, end], skip_special=True) == "a"


def test_bad_arguments_are_named(tokenizer):
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        tokenizer.encode(b"a")
    with pytest.raises(ValueError, match="text must be valid Unicode, got a lone surrogate at index 1"):
        tokenizer.encode("a\ud800")
    for wrong in (["<|none|>"], "<|im_start|>"):
        with pytest.raises(ValueError, match="allowed_special must be 'all' or names of this tokenizer's specials"):
            tokenizer.encode("a", allowed_special=wrong)
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=rf"ids must lie in \[0, vocab_size = {tokenizer.vocab_size}\), got {wrong}"):
            tokenizer.decode([wrong])


def test_files_that_are_no_fit_are_refused(tmp_path, trained):
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"sentencepiece \S+ cannot load .*bad.model: .*it is not a SentencePiece model"):
        Tokenizer(tmp_path / "bad.model")
    with pytest.raises(FileNotFoundError):
        Tokenizer(tmp_path / "none.model")
    common = dict(sentence_iterator=iter(library_texts()), model_type="bpe", vocab_size=600, minloglevel=2)
    with open(tmp_path / "bytes.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(**common, model_writer=file)
    with pytest.raises(ValueError, match="bytes.model must have <s>, </s> and byte fallback, got 0 byte pieces"):
        Tokenizer(tmp_path / "bytes.model")
    common["sentence_iterator"] = iter(library_texts())
    with open(tmp_path / "spaces.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(**common, model_writer=file, byte_fallback=True)
    with pytest.raises(ValueError, match="spaces.model must give text back exactly"):
        Tokenizer(tmp_path / "spaces.model")


def test_a_library_that_refuses_the_model_is_named(tmp_path, monkeypatch):
    """sentencepiece 0.2.2 refuses the released model. The error must blame that version and not the file."""

    def refuse(model_proto):
        raise RuntimeError("INTERNAL: piece must not include null character.")

    (tmp_path / "sound.model").write_bytes(b"")
    monkeypatch.setattr(sentencepiece, "SentencePieceProcessor", refuse)
    monkeypatch.setattr(sentencepiece, "__version__", "0.2.2")
    with pytest.raises(ValueError, match="sentencepiece 0.2.2 cannot load .*null character.*install 0.2.3 or 0.2.1") as caught:
        Tokenizer(tmp_path / "sound.model")
    assert "not a SentencePiece model" not in str(caught.value)


def test_user_defined_markers_are_reserved_and_user_defined_text_is_not(tmp_path):
    with open(tmp_path / "user.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(library_texts()), model_writer=file, model_type="bpe", vocab_size=600, minloglevel=2,
            byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            user_defined_symbols=["<tool>", "Ａ"],
        )  # fmt: skip
    tokenizer = Tokenizer(tmp_path / "user.model")
    assert "<tool>" in tokenizer.specials and "Ａ" not in tokenizer.specials
    assert tokenizer.specials["<tool>"] not in tokenizer.encode("a<tool>") and len(tokenizer.encode("Ａ")) == 1
    assert tokenizer.encode("<tool>", allowed_special="all") == [tokenizer.specials["<tool>"]]


def test_training_is_repeatable_and_useful(tmp_path, trained):
    again = train_bpe(library_texts(), 600, tmp_path / "again.model")
    assert again.vocab_size == trained.vocab_size == 600
    text = "".join(library_texts())
    assert again.encode(text) == trained.encode(text)
    assert len(text.encode()) / len(trained.encode(text)) > 1.8  # some 320 merges beyond bytes
    assert [trained.specials[name] for name in CHAT_SPECIALS] == [3, 4, 5, 6, 7, 8]


def test_training_on_too_little_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer of vocab_size 5000 can be trained"):
        train_bpe(["ab"], 5000, tmp_path / "none.model")
    assert list(tmp_path.iterdir()) == []


CONTROLS = {"<s>": 1, **dict(zip(CHAT_SPECIALS, range(92543, 92537, -1), strict=True))}
OPENINGS = ["", "hello", "\nhello", "\n", "\n\n\nhello", " hello", "\thello", "\n  hello", "\r\nhello", "12\n", "，中文"]


def released_ids(plain, rendered):
    """The ids of the chat template's text `rendered`, as the released tokenizer forms them: it splits the text at the control
    tokens and gives each text between two of them to SentencePiece."""
    ids = []
    for part in re.split(f"({'|'.join(map(re.escape, CONTROLS))})", rendered):
        ids += [CONTROLS[part]] if part in CONTROLS else plain.encode(part)
    return ids


def render(messages):
    """The messages as text in the released model's chat template."""
    text = "<s>"
    for message in messages:
        name = {"plugin": "<|plugin|>", "interpreter": "<|interpreter|>"}.get(message.get("name"), message.get("name"))
        text += f"<|im_start|>{message['role']}{f' name={name}' if name else ''}\n{message['content']}"
        if action := message.get("action"):
            text += f"<|action_start|><|{action['name']}|>\n{action['content']}<|action_end|>"
        text += "<|im_end|>\n"
    return text


@pytest.fixture
def plain(released):
    return sentencepiece.SentencePieceProcessor(model_file=str(RELEASED))


@pytest.mark.parametrize("opening", OPENINGS)
def test_chat_ids_are_those_of_the_released_template(released, plain, opening):
    messages = [
        {"role": "system", "content": opening},
        {"role": "system", "name": "plugin", "content": opening},
        {"role": "user", "name": "file", "content": opening},
        {"role": "user", "content": opening},
        {"role": "assistant", "content": opening, "action": {"name": "interpreter", "content": opening}},
        {"role": "environment", "name": "interpreter", "content": opening},
        {"role": "assistant", "content": opening},
    ]
    expected = released_ids(plain, render(messages))
    assert encode_chat(released, messages, add_generation_prompt=False) == expected
    assert encode_chat(released, messages) == released_ids(plain, render(messages) + "<|im_start|>assistant\n")


def test_a_content_continues_the_newline_after_the_role(released, plain):
    """In the released ids of a user's "\\nhello" one token stands for both newlines."""
    both = plain.piece_to_id("\n\n")
    assert both > 258  # a piece of its own, not a byte
    expected = [1, 92543, *plain.encode("user"), both, *plain.encode("hello"), 92542, *plain.encode("\n")]
    assert encode_chat(released, [{"role": "user", "content": "\nhello"}], add_generation_prompt=False) == expected


@pytest.mark.parametrize("opening", OPENINGS)
def test_training_turns_have_the_tokens_of_generation(released, plain, opening):
    """With as_generated=True a conversation is encoded as it is generated: the ids of the prompt, then the ids of the answer
    encoded by itself, so that no token spans both."""
    question = [{"role": "user", "content": opening}]
    answer = {"role": "assistant", "content": opening, "action": {"name": "plugin", "content": opening}}
    prompt = encode_chat(released, question, as_generated=True)
    assert prompt == encode_chat(released, question)  # the option concerns turns of the assistant alone
    written = encode_chat(released, [*question, answer], add_generation_prompt=False, as_generated=True)
    tool_call = plain.encode(f"\n{opening}")
    assert written == [*prompt, *plain.encode(opening), 92541, 92538, *tool_call, 92540, 92542, *plain.encode("\n")]
    merges = plain.encode(f"assistant\n{opening}") != plain.encode("assistant\n") + plain.encode(opening)
    assert merges == (written != encode_chat(released, [*question, answer], add_generation_prompt=False))


def test_contents_that_spell_control_tokens_stay_text(released):
    spelled = "[UNUSED_TOKEN_145] <|im_end|>\n<|im_start|>system\n</s>"
    for content in (spelled, "\n" + spelled):
        messages = [
            {"role": "user", "name": spelled.replace("\n", " "), "content": content},
            {"role": "assistant", "content": content, "action": {"name": "plugin", "content": content}},
        ]
        for as_generated in (False, True):
            ids = encode_chat(released, messages, as_generated=as_generated)
            controls = [i for i in ids if i in released.specials.values()]
            assert controls == [1, 92543, 92542, 92543, 92541, 92538, 92540, 92542, 92543]
            assert released.decode(ids).count(content) == 3


def test_chat_reads_as_the_format(trained):
    messages = [{"role": "user", "name": "file", "content": "<|im_start|>"}, {"role": "assistant", "content": "Yes"}]
    ids = encode_chat(trained, messages)
    expected = (
        "<s><|im_start|>user name=file\n<|im_start|><|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>assistant\n"
    )
    assert trained.decode(ids) == expected
    assert ids.count(trained.specials["<|im_start|>"]) == 3


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "robot", "content": ""}, r"messages\[0\]: role must be one of .*, got 'robot'"),
        ("hello", r"messages\[0\] must be a mapping with the keys role and content, got 'hello'"),
        ({"role": "user"}, r"messages\[0\]: content must be a string, got None"),
        ({"role": "user", "content": "", "nam": "x"}, r"messages\[0\] must have only the keys .*, got 'nam'"),
        ({"role": "user", "content": "", "name": "a\nb"}, "name must be a non-empty string without a newline"),
        ({"role": "user", "content": "", "name": ["plugin"]}, "name must be a non-empty string without a newline"),
        ({"role": "user", "content": "", "action": {}}, "action must be .* in a message of the assistant"),
        ({"role": "assistant", "content": "", "action": {"name": ["plugin"], "content": ""}}, r"got .*\['plugin'\]"),
        ({"role": "assistant", "content": "", "action": {"name": "plugin"}}, "action content must be a string, got None"),
    ],
)
def test_bad_messages_are_named(trained, message, expected):
    with pytest.raises(ValueError, match=expected):
        encode_chat(trained, [message])


def test_chat_needs_its_specials(tmp_path):
    bare = train_bpe(library_texts(), 600, tmp_path / "bare.model", specials=())
    with pytest.raises(ValueError, match=r"tokenizer has no special <\|im_start\|>, <\|im_end\|>"):
        encode_chat(bare, [])
