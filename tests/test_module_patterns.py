"""Regular expressions of an adapter's config: `re` itself is asked, and nothing waits for it."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from schemas.errors import BadInput
from worker.adapters import module_patterns
from worker.adapters.module_patterns import Matches, PatternMatch, PatternSetting, match_names
from worker.adapters.peft_config import CONFIG_FILE, read_config

PATH = Path("adapter_config.json")
PARENTS = {"self_attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}

#: All modules of a model of 12 layers.
NAMES = [
    f"model.layers.{layer}.{parent}.{part}_proj"
    for layer in range(12)
    for parent, parts in PARENTS.items()
    for part in parts
] + ["model.embed_tokens", "lm_head"]

ORDINARY = [
    "q_proj",
    "model.layers.1.mlp.up_proj",
    r"^model\.layers\.1[01]",
    r".*\.(q|v)_proj",
    r".*self_attn.*",
    r"model\.layers\.(?:[5-9]|1\d)\.(?:mlp|self_attn)\.(?:up|down|q|k)_proj",
    r"(?i).*\.MLP\..*",
    r"(?x) .* \. mlp \. .*  # all of them",
    r"(?=.*mlp)(?!.*gate).*",
    r".*(?<!gate)(?<=_proj)",
    r".*\.(?P<kind>q|k)_proj",
    r"(.)\1.*|lm_head",
    r"(l)?(?(1)m_head|.*embed_tokens)",
    r"(?>model|mod)\..*",
    r"[a-z]++\.layers\.\d++\..*",
    r".*?[^a-z_]{1,2}\d{1,}\..*",
    r"\w+(?:\.\w+){4}",
    r".*\b(?:q|up)_proj\b",
    r"[[:alpha:]]+_head",
    r"lm_hea{e<=1}",
    r".*\.(?:|q|v)_proj",
    r"(?s:.)*_head\Z",
    # As unsloth writes it.
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|down_proj|up_proj|gate_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|down_proj|up_proj|gate_proj)))",
]

#: They take `re` years, hours, or gigabytes.
ENDLESS = [
    r"(([a-z._0-9])+)+X",
    r"(?:){4000000000}",
    "(?i)" + r"[\x00-\U0010ffff]" * 20_000,
    r"(?:.*)*" * 12 + "X",
]


def matches(*patterns: str, whole: bool = True, template: str = "{}") -> Matches:
    return match_names(PATH, [PatternSetting("target_modules", patterns, template, whole)], NAMES)


def expected(*patterns: str, whole: bool = True) -> dict[str, str]:
    """The first pattern that matches, by name."""
    found = {}
    for name in NAMES:
        for pattern in patterns:
            if re.fullmatch(pattern, name) if whole else re.match(pattern, name):
                found[name] = pattern
                break
    return found


@pytest.mark.filterwarnings("ignore:Possible nested set")
@pytest.mark.parametrize("whole", [True, False])
def test_ordinary_patterns_match_what_re_matches(whole: bool) -> None:
    for pattern in ORDINARY:
        found = matches(pattern, whole=whole)["target_modules"]
        assert {name: match.pattern for name, match in found.items()} == expected(
            pattern, whole=whole
        ), pattern
    found = matches(*ORDINARY, whole=whole)["target_modules"]
    assert {name: match.pattern for name, match in found.items()} == expected(
        *ORDINARY, whole=whole
    )


pieces = st.sampled_from(["q", "model", ".", r"\.", "[a-z]", r"\d", "^", "$", "_proj", "layers"])
plain = st.lists(pieces, min_size=1, max_size=6).map("".join)


@given(st.lists(plain, max_size=4, unique=True))
@settings(max_examples=25, deadline=None)
def test_plain_patterns_are_matched_here_as_elsewhere(given: list[str]) -> None:
    asked = PatternSetting("rank_pattern", tuple(given), r"(.*\.)?({})$", whole=False)
    here = [*module_patterns._match_here([asked], NAMES)]
    assert here == [*module_patterns._match_elsewhere((asked,), tuple(NAMES))]
    assert match_names(PATH, [asked], NAMES).keys() == {"rank_pattern"}


def test_a_match_tells_its_layer() -> None:
    found = matches("h|layers", whole=False, template=r"(?:.*?\.)({})\.(?P<idx>\d+)\.")
    match = found["target_modules"]["model.layers.11.mlp.up_proj"]
    assert match == PatternMatch("h|layers", "11")


def write(folder: Path, **changes: object) -> Path:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / CONFIG_FILE).write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("endless", ENDLESS, ids=["nested", "counted", "sets", "many"])
def test_a_pattern_that_takes_too_long_is_refused_and_lets_other_threads_run(
    tmp_path: Path, endless: str
) -> None:
    ticks, has_ended = [0], threading.Event()

    def tick() -> None:
        while not has_ended.wait(0.01):
            ticks[0] += 1

    write(tmp_path, target_modules=endless)
    ticking = threading.Thread(target=tick)
    ticking.start()
    begun = time.monotonic()
    with capture_logs() as logs, pytest.raises(BadInput) as error:
        read_config(tmp_path, NAMES)
    took = time.monotonic() - begun
    has_ended.set()
    ticking.join()
    shown = endless if len(endless) <= 100 else f"{endless[:97]}..."
    place = f"{tmp_path / CONFIG_FILE}: target_modules: '{shown}'"
    assert str(error.value).startswith(f"{place} takes too long to match, or too much memory; ")
    assert [entry["event"] for entry in logs] == ["patterns_given_up"]
    assert ticks[0] > 20 * min(took, 1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"exclude_modules": ENDLESS[0]},
        {"rank_pattern": {"q_proj": 1, ENDLESS[0]: 2}},
        {"alpha_pattern": {ENDLESS[0]: 2}},
        {"layers_pattern": ["h", ENDLESS[0]], "layers_to_transform": [1]},
        {"rank_pattern": {"." * number: 1 for number in range(1400)}},
    ],
    ids=["exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern", "many"],
)
def test_every_setting_with_patterns_is_bounded(
    tmp_path: Path, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_patterns, "_SECONDS", 0.05)
    write(tmp_path, **changes)
    with pytest.raises(BadInput, match=f"{next(iter(changes))}: '.*' takes too long to match"):
        read_config(tmp_path, NAMES)


def test_patterns_that_took_too_long_are_tried_again_and_others_are_matched_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module_patterns._match_elsewhere.cache_clear()
    monkeypatch.setattr(module_patterns, "_PATIENCE", 0.0)
    with pytest.raises(BadInput):
        matches(".*mlp.*")
    monkeypatch.undo()
    for _ in range(2):
        assert len(matches(".*mlp.*")["target_modules"]) == 36
    assert module_patterns._match_elsewhere.cache_info().hits == 1


def test_a_process_that_gets_no_time_at_all_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module_patterns, "_PATIENCE", 0.3)
    monkeypatch.setattr(module_patterns, "_SECONDS", 60.0)
    with pytest.raises(BadInput, match="takes too long"):
        matches(ENDLESS[0])
