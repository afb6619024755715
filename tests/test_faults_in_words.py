"""What pydantic finds wrong is told without its own words."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, Field, ValidationError, field_validator

from schemas.faults import first_fault


class Turn(BaseModel):
    role: str

    @field_validator("role")
    @classmethod
    def _check(cls, role: str) -> str:
        if role == "nobody":
            raise ValueError("Nobody is no role")
        return role


class Record(BaseModel):
    turns: list[Turn]
    size: int = Field(1, ge=1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"turns": [{"role": "a"}, {"role": 3}]}', "turns[1].role: should be a valid string"),
        ('{"turns": [{"role": "nobody"}]}', "turns[0].role: Nobody is no role"),
        ('{"turns": [{}]}', "turns[0].role: field required"),
        ('{"turns": [], "size": 0}', "size: should be greater than or equal to 1"),
        ("[]", "should be an object"),
        ("{", "invalid JSON: EOF while parsing an object at line 1 column 1"),
    ],
)
def test_a_fault_has_its_place_and_plain_words(text: str, told: str) -> None:
    with pytest.raises(ValidationError) as error:
        Record.model_validate_json(text)
    assert first_fault(error.value) == told
