"""Escaping, judged by what a Markdown parser makes of it."""

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lora_da_hf.errors import CardError
from lora_da_hf.hub.markdown import MAX_LENGTH, clean, code, escape, python_literal

PARSER = MarkdownIt("commonmark").enable("table")
HOSTILE = [
    "<script>alert(1)</script>",
    "[click](https://evil.example)",
    "![x](https://evil.example/x.png)",
    "<https://evil.example>",
    "a | b | c",
    "`` ` `` <b>",
    "# heading",
    "- item",
    "1. item",
    "> quote",
    "***",
    "---",
    "line\n\n# heading\n```\ncode",
    "\u202egnp.exe",
    "&lt;b&gt; &amp;",
    "\\",
    "{{ 7 * 7 }} {% raw %}",
    "$x^2$",
    "=",
    "\ud800",
    "~~~",
    "[a]: https://evil.example",
]
ALLOWED = {"paragraph_open", "paragraph_close", "inline", "text", "code_inline", "text_special", "softbreak"}


def token_types(markdown):
    for token in PARSER.parse(markdown):
        yield token.type
        yield from (child.type for child in token.children or [])


def text_of(markdown):
    return "".join(child.content for token in PARSER.parse(markdown) for child in token.children or [])


@pytest.mark.parametrize("text", HOSTILE)
def test_escaped_text_is_shown_as_it_is(text):
    assert set(token_types(escape(text))) <= ALLOWED
    assert text_of(escape(text)) == clean(text)


@given(st.text(max_size=80))
def test_no_text_becomes_markup(text):
    assert set(token_types(f"{escape(text)} {code(text)}")) <= ALLOWED | {"em_open", "em_close"}
    if clean(text):
        assert text_of(f"x {escape(text)}") == f"x {clean(text)}"


@given(st.text(max_size=80), st.text(max_size=80))
def test_no_text_leaves_its_cell(name, value):
    tokens = list(token_types(f"| a | b |\n|---|---|\n| {code(name)} | {escape(value)} |\n"))
    assert tokens.count("td_open") == 2
    assert not {"html_inline", "html_block", "link_open", "image", "fence"} & set(tokens)


@given(st.text(max_size=80))
def test_python_strings_are_literals_of_one_line(text):
    literal = python_literal(text)
    assert ast.literal_eval(literal) == clean(text)
    assert "\n" not in literal
    assert "`" not in literal


def test_text_is_cut_to_a_length():
    assert len(clean("x" * 10_000)) == MAX_LENGTH


def test_addresses_are_not_made_links_by_renderers_that_link_bare_ones():
    assert escape("https://evil.example www.evil.example a@evil.example") == (
        r"https\://evil.example www\.evil.example a\@evil.example"
    )


def test_a_missing_fact_is_an_error():
    with pytest.raises(CardError, match="prints a fact that is missing"):
        escape(None)
