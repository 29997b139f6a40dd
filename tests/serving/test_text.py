"""What a stream gives out never has to be taken back."""

from __future__ import annotations

import itertools

import pytest

from foveate.serving.sampling import Text

CASES = [
    ("the cat sat", ()),
    ("  two  spaces \n inside and around \n", ()),
    ("naïve 😀 ünder größer", ()),
    ("a b END c", ("END",)),
    ("a b EN", ("END",)),
    ("one\n\ntwo", ("\n\n", "zz")),
    ("\nfirst", ("\n",)),
    ("aaab", ("aab",)),
    ("ein 😀 Ende", ("😀 E",)),
    ("x" * 20, ("xy", "xxz")),
]


def pieces(text: str, stops: tuple[str, ...], sizes: tuple[int, ...]) -> tuple[Text, list[str]]:
    """`text` as tokens of some bytes each, in turn, and what is given out after each of them."""
    data, parts, size = text.encode(), [], itertools.cycle(sizes)
    while data:
        n = next(size)
        parts.append(data[:n])
        data = data[n:]
    written = Text(lambda ids: b"".join(parts[i] for i in ids).decode(errors="replace"), stops)
    given = []
    for i in range(len(parts)):
        written.add(i)
        if written.stopped:
            break
        given.append(written.take())
    return written, [*given, written.take(complete=True)]


@pytest.mark.parametrize("sizes", [(1,), (2,), (3, 1), (5, 2, 7), (100,)])
@pytest.mark.parametrize(("text", "stops"), CASES)
def test_pieces_joined_are_the_answer_up_to_the_stop_string(text, stops, sizes):
    cut = min((text.find(s) for s in stops if s in text), default=len(text))
    written, given = pieces(text, stops, sizes)
    assert "".join(given) == text[:cut].strip()
    assert written.stopped == any(s in text for s in stops)
    whole = ""
    for piece in given:
        whole += piece
        assert text[:cut].strip().startswith(whole)
        assert "\ufffd" not in piece


def test_text_is_given_out_as_it_comes():
    assert pieces("the cat sat", (), (4, 3, 4))[1] == ["the", " cat", " sat", ""]
    assert pieces("so ENd END", ("END",), (3, 2, 1, 4))[1] == ["so", "", " ENd", ""]


def test_bytes_that_never_become_a_character_are_given_out_at_the_end():
    parts = [b"a", b"\xf0\x9f"]
    written = Text(lambda ids: b"".join(parts[i] for i in ids).decode(errors="replace"))
    written.add(0)
    assert written.take() == "a"
    written.add(1)
    assert written.take() == ""
    assert written.take(complete=True) == "\ufffd"


def test_a_second_attempt_goes_on_where_the_first_was():
    words = ["the", " cat", " sat", " down"]
    written = Text(lambda ids: "".join(words[i] for i in ids))
    given = []
    for token in (0, 1):
        written.add(token)
        given.append(written.take())
    written.restart()
    for token in (0, 1, 2, 3):
        written.add(token)
        given.append(written.take())
    assert given == ["the", " cat", "", "", " sat", " down"]
