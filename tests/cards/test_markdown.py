"""Escaping, judged by what a Markdown parser makes of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lora_da_hf.hub.cards import MAX_LENGTH, clean, code, escape

PARSER = MarkdownIt("commonmark").enable("table")
HOSTILE = [
    *("<script>alert(1)</script>", "<https://evil.example>", "[click](https://evil.example)", "[a]: https://e.example"),
    *("![x](https://evil.example/x.png)", "a | b | c", "`` ` `` <b>", "# heading", "- item", "1. item", "> quote"),
    *("---", "~~~", "=", "$x^2$", "\\", "&lt;b&gt; &amp;", "line\n\n# heading\n```\ncode", "\u202egnp.exe", "\ud800"),
]
ALLOWED = {"paragraph_open", "paragraph_close", "inline", "text", "code_inline", "text_special", "softbreak"}


def token_types(markdown):
    for token in PARSER.parse(markdown):
        yield token.type
        yield from (child.type for child in token.children or [])


@pytest.mark.parametrize("text", HOSTILE)
def test_escaped_text_is_shown_as_it_is(text):
    assert set(token_types(escape(text))) <= ALLOWED
    children = [child for token in PARSER.parse(escape(text)) for child in token.children or []]
    assert "".join(child.content for child in children) == clean(text)


@given(st.text(max_size=80), st.text(max_size=80))
def test_no_text_becomes_markup_or_leaves_its_cell(name, value):
    assert set(token_types(f"{escape(value)} {code(name)}")) <= ALLOWED | {"em_open", "em_close"}
    tokens = list(token_types(f"| a | b |\n|---|---|\n| {code(name)} | {escape(value)} |\n"))
    assert tokens.count("td_open") == 2
    assert not {"html_inline", "html_block", "link_open", "image", "fence"} & set(tokens)


def test_what_is_long_or_an_address():
    assert len(clean("x" * 10_000)) == MAX_LENGTH
    assert escape("https://e.example www.e.example a@e.example") == r"https\://e.example www\.e.example a\@e.example"
