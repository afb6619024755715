"""A line of a prompts file, right and wrong."""

from __future__ import annotations

from io import BytesIO

import pytest

from producer import lines
from producer.lines import make_job, numbered_lines, parse_line
from schemas.errors import BadInput
from schemas.job import Job


def parse(line: str, lora: str | None = None) -> Job:
    return parse_line(line.encode(), made_id="made.1", defaults={"lora": lora})


def refusal(line: str | bytes) -> str:
    data = line.encode() if isinstance(line, str) else line
    with pytest.raises(BadInput) as refused:
        parse_line(data, made_id="made.1")
    return str(refused.value)


def test_a_json_string_is_a_prompt() -> None:
    assert parse('"Hello"').prompt == "Hello"


def test_an_object_sets_the_fields_of_a_job() -> None:
    job = parse('{"prompt": "x", "max_tokens": 7, "stop": ["."], "metadata": {"row": 1}}')
    assert job == Job(id="made.1", prompt="x", max_tokens=7, stop=["."], metadata={"row": 1})


def test_a_chat_is_a_list_of_messages() -> None:
    job = parse('{"messages": [{"role": "user", "content": "Hello"}]}')
    assert job.messages is not None
    assert job.messages[0].content == "Hello"


@pytest.mark.parametrize("line", ['{"prompt": "x"}', '{"prompt": "x", "id": null}', '"x"'])
def test_a_line_without_id_gets_the_made_one(line: str) -> None:
    assert parse(line).id == "made.1"


def test_an_id_of_the_line_is_kept() -> None:
    assert parse('{"prompt": "x", "id": "row-1"}').id == "row-1"


@pytest.mark.parametrize("line", ['{"prompt": "x"}', '"x"'])
def test_a_line_that_names_no_adapter_gets_the_default(line: str) -> None:
    assert parse(line, lora="sql").lora == "sql"


def test_an_adapter_of_the_line_wins_over_the_default() -> None:
    assert parse('{"prompt": "x", "lora": "json"}', lora="sql").lora == "json"


def test_an_explicit_null_wins_over_the_default_adapter() -> None:
    assert parse('{"prompt": "x", "lora": null}', lora="sql").lora is None


def test_whole_numbers_serve_as_temperatures() -> None:
    assert parse('{"prompt": "x", "temperature": 1}').temperature == 1.0


def test_a_stop_string_alone_is_a_list_of_one() -> None:
    assert parse('{"prompt": "x", "stop": "."}').stop == ["."]


def test_the_keys_of_a_logit_bias_are_token_ids() -> None:
    job = parse('{"prompt": "x", "logit_bias": {"5": 1, "7": -100}}')
    assert job.logit_bias == {5: 1.0, 7: -100.0}
    assert Job.from_wire(job.to_wire()) == job


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ("", None),
        (', "logprobs": null', None),
        (', "logprobs": false', None),
        (', "logprobs": true', 0),
        (', "logprobs": 0', 0),
        (', "logprobs": 5', 5),
        (', "logprobs": true, "top_logprobs": 3', 3),
    ],
)
def test_logprobs_are_asked_for_as_in_chats_or_as_in_completions(
    fields: str, number: int | None
) -> None:
    job = parse(f'{{"prompt": "x"{fields}}}')
    assert job.num_logprobs == number
    assert Job.from_wire(job.to_wire()) == job


def test_equal_content_gives_equal_records() -> None:
    spelled_out = '{"temperature": 0, "prompt": "x", "seed": null, "max_tokens": 128}'
    assert parse(spelled_out).to_wire() == parse('"x"').to_wire()


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("promt", "prompt"),
        ("temprature", "temperature"),
        ("max_new_tokens", "max_tokens"),
        ("adapter", "lora"),
        ("custom_id", "id"),
    ],
)
def test_an_unknown_field_is_refused_with_the_one_that_was_meant(field: str, hint: str) -> None:
    assert f"unknown field '{field}': did you mean '{hint}'?" in refusal(f'{{"{field}": 1}}')


def test_a_field_like_no_other_is_refused_with_the_known_ones() -> None:
    assert "known are max_tokens, temperature" in refusal('{"prompt": "x", "zzz": 1}')


def test_an_unknown_field_of_a_message_is_refused_with_its_place() -> None:
    line = '{"messages": [{"role": "user", "content": "x", "name": "y"}]}'
    assert refusal(line) == "unknown field 'messages[0].name': known are role, content"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('"prompt": 5', "prompt: should be a valid string (found 5)"),
        ('"prompt": ["x"]', "prompt: should be a valid string (found an array)"),
        ('"prompt": "x", "max_tokens": 0', "max_tokens: should be greater than or equal to 1"),
        ('"prompt": "x", "max_tokens": 6.5', "max_tokens: should be a valid integer (found 6.5)"),
        ('"prompt": "x", "max_tokens": "6"', "max_tokens: should be a valid integer (found '6')"),
        ('"prompt": "x", "max_tokens": null', "max_tokens: should be a valid integer (found null)"),
        ('"prompt": "x", "temperature": true', "temperature: should be a valid number"),
        ('"prompt": "x", "temperature": -1', "temperature: should be greater than or equal to 0"),
        ('"prompt": "x", "temperature": NaN', "temperature: should be a finite number (found NaN)"),
        ('"prompt": "x", "top_p": 0', "top_p: should be greater than 0"),
        ('"prompt": "x", "top_k": -2', "top_k: should be greater than or equal to -1"),
        ('"prompt": "x", "min_p": 1.5', "min_p: should be less than or equal to 1"),
        ('"prompt": "x", "min_tokens": 200', "min_tokens: should be at most max_tokens, 128"),
        ('"prompt": "x", "repetition_penalty": 0', "repetition_penalty: should be greater than or"),
        ('"prompt": "x", "presence_penalty": 3', "presence_penalty: should be less than or equal"),
        ('"prompt": "x", "logit_bias": [1]', "logit_bias: should be an object of token ids and"),
        ('"prompt": "x", "logit_bias": {"a": 1}', "logit_bias: should have token ids as keys (fou"),
        ('"prompt": "x", "logit_bias": {"-1": 1}', "logit_bias: should have token ids as keys (f"),
        ('"prompt": "x", "logit_bias": {"5": 101}', "logit_bias[5]: should be less than or equal"),
        ('"prompt": "x", "logit_bias": {"5": 1, "05": 1}', "logit_bias: a token is named twice"),
        ('"prompt": "x", "stop_token_ids": [-1]', "stop_token_ids[0]: should be greater than or"),
        ('"prompt": "x", "bad_words": [""]', "bad_words[0]: should have at least 1 character"),
        ('"prompt": "x", "logprobs": 21', "logprobs: should be less than or equal to 20"),
        ('"prompt": "x", "top_logprobs": 2', "top_logprobs: needs logprobs; set it to true"),
        ('"prompt": "x", "prompt_logprobs": true', "prompt_logprobs: should be a valid integer"),
        ('"prompt": "x", "n": 129', "n: should be less than or equal to 128"),
        ('"prompt": "x", "seed": 18446744073709551616', "seed: should be less than"),
        ('"prompt": "x", "stop": 3', "stop: should be a valid list (found 3)"),
        ('"prompt": "x", "stop": [""]', "stop[0]: should have at least 1 character"),
        ('"prompt": "x", "ignore_eos": 1', "ignore_eos: should be a valid boolean"),
        ('"prompt": "x", "id": ""', "id: should have at least 1 character"),
        ('"prompt": "x", "id": "a b"', "id: should be without spaces and control characters"),
        ('"prompt": "x", "id": 17', "id: should be a valid string (found 17)"),
        ('"prompt": "x", "lora": "my sql"', "lora: should be letters, digits and . _ - /"),
        ('"prompt": "x", "lora": "@base"', "lora: should be letters, digits and . _ - /"),
        ('"messages": []', "messages: should have at least 1 item"),
        ('"messages": [{"role": "bot", "content": ""}]', "messages[0].role: should be 'system',"),
        ('"messages": [{"role": "user"}]', "messages[0].content: field required"),
        ('"prompt_token_ids": []', "prompt_token_ids: should have at least 1 item"),
        ('"prompt_token_ids": [1, -2]', "prompt_token_ids[1]: should be greater than or equal"),
        ('"prompt": "x", "metadata": NaN', "metadata: NaN, infinity and endless nesting cannot"),
        ('"prompt": "x", "metadata": [1e999]', "metadata: NaN, infinity and endless nesting"),
    ],
)
def test_a_wrong_value_is_refused_with_its_field_and_what_was_found(
    fields: str, message: str
) -> None:
    assert refusal(f"{{{fields}}}").startswith(message)


def test_what_was_found_is_told_once() -> None:
    assert refusal('{"messages": []}') == "messages: should have at least 1 item, not 0"
    assert refusal('{"prompt": "x", "deadline": "soon"}').endswith("+01:00' (found 'soon')")
    assert refusal('{"prompt": "x", "deadline": -1}').endswith("+01:00' (found -1)")
    assert refusal('{"prompt": "x", "deadline": -1}').startswith("deadline: should be a number")


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ("", "none of them"),
        ('"prompt": "x", "prompt_token_ids": [1]', "prompt and prompt_token_ids"),
        ('"prompt": null', "none of them"),
    ],
)
def test_a_line_without_exactly_one_prompt_is_refused(fields: str, found: str) -> None:
    expected = f"give exactly one of prompt, messages, prompt_token_ids (found {found})"
    assert refusal(f"{{{fields}}}") == expected


def test_several_faults_are_told_together() -> None:
    message = refusal('{"prompt": 1, "top_p": 2, "seed": -1, "stop": 1, "top_k": "a"}')
    assert message.count("should") == 3
    assert message.endswith("; and 2 more")


def test_a_million_wrong_tokens_are_one_fault() -> None:
    assert ";" not in refusal('{"prompt_token_ids": [' + "-1," * 999_999 + "-1]}")


@pytest.mark.parametrize(
    ("line", "found"),
    [("[1, 2]", "an array"), ("42", "42"), ("null", "null"), ("true", "true"), ("NaN", "NaN")],
)
def test_a_line_that_is_neither_object_nor_string_is_refused(line: str, found: str) -> None:
    assert refusal(line).endswith(f"not {found}")


@pytest.mark.parametrize(
    "line", ["nonsense", "{'prompt': 1}", '{"prompt": "x"', '"x" "y"', "[" * 1000, '"\\ud800"']
)
def test_a_line_that_is_not_json_is_refused_with_the_column(line: str) -> None:
    message = refusal(line + "\n")
    assert message.startswith("not JSON: ")
    assert " at column " in message


def test_a_line_that_is_not_utf8_is_refused_with_the_byte() -> None:
    assert refusal(b'"\xff"') == "not UTF-8: byte 0xff at position 2"


def test_a_line_that_is_too_long_is_refused_with_the_bound() -> None:
    assert refusal(b'"' + b"x" * lines.MAX_LINE_BYTES) == "the line is longer than 16 MiB"


def test_what_is_shown_of_a_value_is_short() -> None:
    assert len(refusal(f'{{"id": "{"x" * 300}", "prompt": ""}}')) < 120


def test_a_python_mapping_serves_as_a_line() -> None:
    assert make_job({"prompt": "x", "top_k": 3}, made_id="m", defaults={"lora": "sql"}).top_k == 3


def test_a_job_is_taken_as_it_is() -> None:
    job = Job(id="row-1", prompt="x")
    assert make_job(job, made_id="m", defaults={"lora": "sql"}) == job


@pytest.mark.parametrize(
    "value",
    [7, ["x"], {"prompt": "\ud800"}, {"prompt": "x", "metadata": {"a": float("nan")}}, {1: 2}],
)
def test_a_python_value_that_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(BadInput):
        make_job(value, made_id="m")


def test_lines_are_numbered_from_one_and_blank_ones_count() -> None:
    assert list(numbered_lines(BytesIO(b'"a"\n\n  \t\r\n"b"'))) == [(1, b'"a"\n'), (4, b'"b"')]


def test_a_byte_order_mark_is_skipped() -> None:
    assert list(numbered_lines(BytesIO(b'\xef\xbb\xbf"a"\n'))) == [(1, b'"a"\n')]


def test_a_file_of_a_byte_order_mark_alone_has_no_lines() -> None:
    assert not list(numbered_lines(BytesIO(b"\xef\xbb\xbf")))


def test_windows_line_ends_belong_to_no_prompt() -> None:
    ((_, line),) = numbered_lines(BytesIO(b'"a"\r\n'))
    assert parse_line(line, made_id="m").prompt == "a"


def test_the_line_after_one_that_is_too_long_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 10)
    found = list(numbered_lines(BytesIO(b"x" * 35 + b"\n" + b"y" * 11 + b"\n" + b'"next"')))
    assert [number for number, _ in found] == [1, 2, 3]
    assert found[2][1] == b'"next"'


def test_the_longest_line_allowed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 10)
    ((_, line),) = numbered_lines(BytesIO(b'"12345678"'))
    assert parse_line(line, made_id="m").prompt == "12345678"
