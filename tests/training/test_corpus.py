"""Reading documents from the standard library, folders and JSON lines, and what is refused."""

import json

import pytest

from internlm2.data import read_documents, split_validation
from internlm2.data.corpus import Document


def test_standard_library():
    documents = read_documents("stdlib", 600_000)
    names = [d.name for d in documents]
    assert len(names) == len(set(names)) >= 10
    assert sum(len(d.text.encode()) for d in documents) <= 600_000
    assert all(n.endswith(".py") and not {"test", "tests", "site-packages"}.intersection(n.split("/")) for n in names)
    assert documents == read_documents("stdlib", 600_000)
    # A larger bound adds documents at the end and changes none of the others.
    assert read_documents("stdlib", 1_200_000)[: len(documents)] == documents


def test_folder_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("alpha", encoding="utf-8")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.md").write_text("beta é", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"text": "gamma"}\n\n{"content": "delta"}\n', encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    found = {d.name: d.text for d in read_documents(str(tmp_path), 10_000)}
    assert found == {"a.txt": "alpha", "deep/b.md": "beta é", "c.jsonl:1": "gamma", "c.jsonl:3": "delta"}
    assert read_documents(str(tmp_path / "a.txt"), 10_000) == [Document("a.txt", "alpha")]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085"])
def test_only_a_newline_ends_a_json_line(tmp_path, character):
    """A JSON string may hold U+2028, U+2029 and U+0085 unescaped; str.splitlines would cut the line at each of them."""
    texts = [f"one{character}line", "the second line", character.join("abc")]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = read_documents(str(tmp_path), 10_000)
    assert found == [Document(f"a.jsonl:{number}", text) for number, text in enumerate(texts, 1)]


def test_a_carriage_return_is_white_space_of_json(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text":\r "one"}\r\n{"text": "two"}\r\n')
    assert read_documents(str(tmp_path), 100) == [Document("a.jsonl:1", "one"), Document("a.jsonl:2", "two")]


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="max_bytes must be positive, got 0"):
        read_documents("stdlib", 0)
    with pytest.raises(ValueError, match="got '.*nowhere'"):
        read_documents(str(tmp_path / "nowhere"), 100)
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(ValueError, match=r'source a.jsonl, line 2: expected an object with a "text" string'):
        read_documents(str(tmp_path), 100)
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(ValueError, match="source a.jsonl, line 1: expected a JSON object"):
        read_documents(str(tmp_path), 100)
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800"}')
    message = "source a.jsonl, line 1: the text must be valid Unicode, got a lone surrogate at index 1"
    with pytest.raises(ValueError, match=message):
        read_documents(str(tmp_path), 100)


def test_split_depends_on_the_name_alone():
    documents = [Document(f"{i}.txt", str(i)) for i in range(2000)]
    train, held_out = split_validation(documents, 0.05)
    assert 60 <= len(held_out) <= 140
    assert sorted(train + held_out, key=documents.index) == documents
    _, of_half = split_validation(documents[:1000], 0.05)
    assert of_half == [d for d in held_out if int(d.text) < 1000]


def test_split_never_leaves_a_side_empty():
    documents = [Document(f"{i}.txt", "") for i in range(3)]
    for fraction in (1e-9, 1 - 1e-9):
        train, held_out = split_validation(documents, fraction)
        assert train and held_out
    with pytest.raises(ValueError, match="two or more"):
        split_validation(documents[:1], 0.5)
    with pytest.raises(ValueError, match="fraction must lie between 0 and 1, got 1"):
        split_validation(documents, 1)
