"""Prompts in and answers out, with a small tokenizer trained here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer, decoders, models
from tokenizers import Tokenizer as RustTokenizer

from schemas.errors import BadInput, JobError
from schemas.job import Job
from worker.stop_strings import StopSearch
from worker.text import Tokenizer

SENTENCES = [
    "The lorry carries many adapters, and the world sees one queue.",
    "One world, one lorry, many worlds: hello world, hello lorry!",
    "Prompts go in, answers come out; the word is used for nothing else.",
]
END = "<|end|>"

#: Characters of one to four bytes, and such as are made of several characters.
SCRIPTS = [
    "🚚",
    "你好",
    "नमस्ते",
    "مرحبا",
    "שלום",
    "👩‍👩‍👧‍👦",
    "🇵🇹",
    "e\u0301",
    "한국어",
    "ภาษาไทย",
    "Ж",
]
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(folder: Path, template: object = TEMPLATE, vocab_size: int = 340) -> Tokenizer:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        SENTENCES, vocab_size=340, special_tokens=[END], show_progress=False
    )
    trained.save(str(folder / "tokenizer.json"))
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "clean_up_tokenization_spaces": True,
    }
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder, vocab_size)


def make_byte_fallback_tokenizer(folder: Path) -> Tokenizer:
    """Like Llama 2's: what it has no word for is bytes, and a run of bytes is text as a whole."""
    words = [END, "▁", "▁a", "a", "b", "▁the", "lorry", "é", "!", "▁."]
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = RustTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.add_special_tokens([END])
    strip = decoders.Strip(" ", left=1, right=0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder, vocab_size=len(tokens))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=[make_tokenizer, make_byte_fallback_tokenizer])
def any_tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    make: Callable[[Path], Tokenizer] = request.param
    return make(tmp_path_factory.mktemp("tokenizer"))


def job(**fields: object) -> Job:
    return Job.model_validate({"id": "a", **fields})


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(job(prompt=text))


def chat(*turns: tuple[str, str]) -> Job:
    return job(messages=[{"role": role, "content": content} for role, content in turns])


# --- Prompts ------------------------------------------------------------------------------------


def test_a_prompt_comes_back_from_its_tokens(tokenizer: Tokenizer) -> None:
    text = "Hello world , it 's 20 °C — naïve 🚚!\n\n  done ."
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


def test_messages_go_through_the_models_chat_template(tokenizer: Tokenizer) -> None:
    rendered = "<system>be brief\n<user>hello\n<assistant>hi\n<user>lorry?\n<assistant>"
    messages = chat(
        ("system", "be brief"), ("user", "hello"), ("assistant", "hi"), ("user", "lorry?")
    )
    assert tokenizer.encode(messages) == ids_of(tokenizer, rendered)


def test_messages_are_refused_by_a_model_without_a_chat_template(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="send prompt instead of messages") as error:
        make_tokenizer(tmp_path, template=None).encode(chat(("user", "hello")))
    assert error.value.code == "no_chat_template"


def test_messages_that_the_template_refuses_are_refused_in_its_words(tokenizer: Tokenizer) -> None:
    with pytest.raises(JobError, match="refuses the messages: no tools here") as error:
        tokenizer.encode(chat(("tool", "42")))
    assert error.value.code == "bad_prompt"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 + messages[0].content }}", "unsupported operand type"),
        ([{"name": "rag", "template": TEMPLATE}], "no default specified"),
        ("{% if %}", "Expected an expression"),
    ],
    ids=["TypeError", "no default", "syntax"],
)
def test_a_chat_template_that_fails_in_its_own_way_refuses_the_messages(
    tmp_path: Path, template: object, reason: str
) -> None:
    with pytest.raises(JobError, match="refuses the messages: .*" + reason) as error:
        make_tokenizer(tmp_path, template).encode(chat(("user", "hello")))
    assert error.value.code == "bad_prompt"


def test_an_empty_prompt_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(JobError, match="the prompt is empty") as error:
        tokenizer.encode(job(prompt=""))
    assert error.value.code == "bad_prompt"


def test_messages_of_which_the_template_makes_nothing_are_refused(tmp_path: Path) -> None:
    """A sequence without a token has no row in a batch."""
    template = "{% for message in messages if message.role == 'user' %}{{ message }}{% endfor %}"
    with pytest.raises(JobError) as error:
        make_tokenizer(tmp_path, template).encode(chat(("system", "be brief")))
    assert error.value.code == "bad_prompt"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "hello lorry"},
        {"messages": [{"role": "user", "content": "hello lorry"}]},
        {"prompt_token_ids": [1, 300]},
    ],
    ids=["text", "chat", "tokens"],
)
def test_a_token_that_the_model_does_not_have_is_refused(
    tmp_path: Path, fields: dict[str, object]
) -> None:
    """A tokenizer may know more tokens than the model has embeddings."""
    tokenizer = make_tokenizer(tmp_path, vocab_size=60)
    with pytest.raises(JobError, match=r"holds token \d+; the model's vocabulary has 60") as error:
        tokenizer.encode(job(**fields))
    assert error.value.code == "bad_prompt"


def test_special_tokens_are_no_part_of_an_answer(tokenizer: Tokenizer) -> None:
    hello, end = ids_of(tokenizer, "hello"), ids_of(tokenizer, END)
    assert len(end) == 1
    assert tokenizer.decode([*end, *hello, *end]) == "hello"


# --- Stop strings -------------------------------------------------------------------------------


def run_until_stop(
    tokenizer: Tokenizer, token_ids: list[int], stops: list[str], min_tokens: int = 0
) -> tuple[int, str] | None:
    """After how many tokens a stop string is found, and the text before it."""
    search = tokenizer.stop_search(stops, min_tokens)
    for number, token_id in enumerate(token_ids, start=1):
        text = search.text_before_stop(token_id)
        if text is not None:
            return number, text
    return None


def run_until_whole_text_stops(
    tokenizer: Tokenizer, token_ids: list[int], stops: list[str], min_tokens: int = 0
) -> tuple[int, str] | None:
    """The same by decoding the whole answer after every token."""
    ignored = next(
        text
        for end in range(min_tokens, -1, -1)
        if not (text := tokenizer.decode(token_ids[:end]) or "").endswith(
            "\N{REPLACEMENT CHARACTER}"
        )
    )
    for number in range(min_tokens + 1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:number]) or ""
        ends = [
            start
            for stop in stops
            for start in range(len(text))
            if text.startswith(stop, start) and start + len(stop) > len(ignored)
        ]
        if ends:
            return number, text[: min(ends)]
    return None


def test_a_stop_string_inside_one_token_is_found(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "hello world")
    assert tokenizer.decode(ids[-1:]) == " world"
    assert run_until_stop(tokenizer, ids, ["orl"]) == (len(ids), "hello w")


def test_a_stop_string_across_token_borders_is_found(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "hello world, one lorry")
    assert not any("o w" in str(tokenizer.decode([token])) for token in ids)
    assert run_until_stop(tokenizer, ids, ["llo wor"]) == (
        len(ids_of(tokenizer, "hello world")),
        "he",
    )


def test_a_stop_string_over_many_tokens_is_found(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "a 0123456789 b")
    found = run_until_stop(tokenizer, ids, ["0123456789"])
    assert found == (len(ids_of(tokenizer, "a 0123456789")), "a ")


def test_a_stop_string_inside_a_character_of_several_tokens_is_found(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "go 🚚 on")
    assert len(ids_of(tokenizer, "🚚")) == 4
    assert run_until_stop(tokenizer, ids, ["🚚"]) == (len(ids_of(tokenizer, "go 🚚")), "go ")


def test_a_stop_string_at_the_very_start_leaves_an_empty_text(tokenizer: Tokenizer) -> None:
    found = run_until_stop(tokenizer, ids_of(tokenizer, "hello world"), ["hello"])
    assert found == (len(ids_of(tokenizer, "hello")), "")


def test_a_stop_string_at_the_very_end_is_found(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "hello world!")
    assert run_until_stop(tokenizer, ids, ["!"]) == (len(ids), "hello world")


def test_the_first_of_several_stop_strings_ends_the_text(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "one lorry, many worlds")
    found = run_until_stop(tokenizer, ids, ["worlds", ", ", "many"])
    assert found is not None
    assert found[1] == "one lorry"


def test_the_first_of_two_stop_strings_in_one_token_ends_the_text(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "hello world")
    assert run_until_stop(tokenizer, ids, ["ld", "or"]) == (len(ids), "hello w")


def test_the_shorter_of_two_stop_strings_does_not_hide_the_longer(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "a 0123456789 b")
    found = run_until_stop(tokenizer, ids, ["!", "0123456789"])
    assert found == (len(ids_of(tokenizer, "a 0123456789")), "a ")


def test_the_longer_of_two_stop_strings_does_not_hide_the_shorter(tokenizer: Tokenizer) -> None:
    found = run_until_stop(tokenizer, ids_of(tokenizer, "a, b, c"), ["never there at all", ", "])
    assert found is not None
    assert found[1] == "a"


def test_a_stop_string_that_never_comes_ends_nothing(tokenizer: Tokenizer) -> None:
    assert run_until_stop(tokenizer, ids_of(tokenizer, "hello world"), ["World", "hellow"]) is None


def test_a_special_token_between_does_not_hide_a_stop_string(tokenizer: Tokenizer) -> None:
    """It is no part of the text."""
    ids = ids_of(tokenizer, "hello" + END + " world")
    found = run_until_stop(tokenizer, ids, ["lo wo"])
    assert found is not None
    assert found[1] == "hel"


def test_a_stop_string_within_min_tokens_is_passed_over(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "a, b, c")
    first = len(ids_of(tokenizer, "a,"))
    assert run_until_stop(tokenizer, ids, [","], first - 1) == (first, "a")
    for min_tokens in range(first, len(ids_of(tokenizer, "a, b,"))):
        assert run_until_stop(tokenizer, ids, [","], min_tokens) == (
            len(ids_of(tokenizer, "a, b,")),
            "a, b",
        )
    assert run_until_stop(tokenizer, ids, [","], len(ids)) is None


def test_a_stop_string_that_begins_within_min_tokens_and_ends_behind_is_found(
    tokenizer: Tokenizer,
) -> None:
    ids = ids_of(tokenizer, "a 0123456789 b")
    whole = len(ids_of(tokenizer, "a 0123456789"))
    assert run_until_stop(tokenizer, ids, ["0123456789"], whole - 1) == (whole, "a ")


@pytest.mark.parametrize(
    "text",
    [
        *SENTENCES,
        "naïve café 🚚🚚 中文字 — „so“ it 's , he said . ✂",
        "  spaces \t tabs\n\n\nlines \r\n and the end✂",
    ],
)
def test_the_text_before_a_stop_string_is_that_of_decoding_the_whole(
    tokenizer: Tokenizer, text: str
) -> None:
    ids = ids_of(tokenizer, text)
    whole, stop = tokenizer.decode(ids), text[-1]
    assert whole is not None
    found = run_until_stop(tokenizer, ids, [stop])
    assert found is not None
    assert found[1] == whole[: whole.index(stop)]


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_a_stop_string_is_found_when_and_where_the_whole_text_holds_it(
    any_tokenizer: Tokenizer, data: st.DataObject
) -> None:
    """Also among tokens that are no text, or no character yet."""
    texts = st.sampled_from([*SCRIPTS, "é a", "lorry!", "\n", END])
    pieces = texts.map(lambda text: ids_of(any_tokenizer, text)) | st.tuples(st.integers(0, 265))
    ids = [token for piece in data.draw(st.lists(pieces, min_size=1)) for token in piece]
    whole = any_tokenizer.decode(ids) or "!"
    start = data.draw(st.integers(0, len(whole) - 1))
    stops = [whole[start : start + data.draw(st.integers(1, 9))], "never there"]
    assume("\N{REPLACEMENT CHARACTER}" not in stops[0])
    min_tokens = data.draw(st.just(0) | st.integers(0, len(ids)))
    found = run_until_stop(any_tokenizer, ids, stops, min_tokens)
    assert found == run_until_whole_text_stops(any_tokenizer, ids, stops, min_tokens)


def test_bytes_that_are_no_text_end_no_search(any_tokenizer: Tokenizer) -> None:
    ids = [*range(256), *ids_of(any_tokenizer, "a!")]
    found = run_until_stop(any_tokenizer, ids, ["a!"])
    assert found == run_until_whole_text_stops(any_tokenizer, ids, ["a!"])
    assert found is not None


def test_what_a_search_decodes_does_not_grow_with_the_answer() -> None:
    lengths = []

    def decode(token_ids: list[int]) -> str:
        lengths.append(len(token_ids))
        return "".join(map(chr, token_ids))

    search = StopSearch(["stop"], decode)
    for _ in range(1000):
        assert search.text_before_stop(ord("\N{REPLACEMENT CHARACTER}")) is None
    assert max(lengths) == 8
    assert len(lengths) <= 5 * 1000


@pytest.mark.parametrize("text", ["", "{", '{"model": 3}', "[]"])
def test_a_tokenizer_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BadInput) as error:
        Tokenizer(tmp_path, 1)
    assert str(error.value).startswith(f"--model-path {tmp_path}: cannot read its tokenizer: ")
    assert "\n" not in str(error.value)


# --- Tokens by themselves -----------------------------------------------------------------------


def written(tokenizer: Tokenizer, token_ids: list[int]) -> bytes:
    return b"".join(bytes(tokenizer.token(token_id)[1] or []) for token_id in token_ids)


@settings(max_examples=300, deadline=None)
@given(text=st.text(min_size=1) | st.lists(st.sampled_from(SCRIPTS), min_size=1).map(" ".join))
def test_the_bytes_of_tokens_are_together_those_of_the_text(
    any_tokenizer: Tokenizer, text: str
) -> None:
    ids = ids_of(any_tokenizer, text)
    assume(ids_of(any_tokenizer, END)[0] not in ids)
    # A decoder may strip the space that begins a text.
    assert written(any_tokenizer, ids).removeprefix(b" ") == (
        (any_tokenizer.decode(ids) or "").encode().removeprefix(b" ")
    )


def test_a_part_of_a_character_has_no_text_but_bytes(any_tokenizer: Tokenizer) -> None:
    ids = ids_of(any_tokenizer, "🚚")[-4:]
    told = [any_tokenizer.token(token_id) for token_id in ids]
    assert [text for text, _ in told] == 4 * ["\N{REPLACEMENT CHARACTER}"]
    assert [data for _, data in told] == [[byte] for byte in "🚚".encode()]


def test_a_token_keeps_the_space_before_a_word(tokenizer: Tokenizer) -> None:
    (token_id,) = ids_of(tokenizer, " world")
    assert tokenizer.token(token_id) == (" world", list(b" world"))


def test_a_special_token_is_told_as_it_is_written(any_tokenizer: Tokenizer) -> None:
    (token_id,) = ids_of(any_tokenizer, END)[-1:]
    assert any_tokenizer.token(token_id) == (END, list(END.encode()))


def test_without_a_tokenizer_a_token_has_neither_text_nor_bytes(tmp_path: Path) -> None:
    assert Tokenizer(tmp_path, 10).token(3) == ("", None)


def test_a_bad_word_is_spelled_as_it_begins_a_text_and_as_it_follows_a_space(
    tokenizer: Tokenizer,
) -> None:
    found = tokenizer.spellings(["world", " world", "hello lorry"])
    texts = ("world", " world", "hello lorry", " hello lorry")
    assert found == [ids_of(tokenizer, text) for text in texts]


def test_a_spelling_that_the_model_has_no_tokens_for_is_left_out(tmp_path: Path) -> None:
    assert make_tokenizer(tmp_path, vocab_size=60).spellings(["world"]) == []
