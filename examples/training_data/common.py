"""What the three generators share: the form of an example, and names that nothing else bears."""

from typing import NamedTuple


class Example(NamedTuple):
    """What a user asks and what the trained adapter should answer."""

    prompt: str
    answer: str


# fmt: off
INVENTED_NAMES = tuple(
    start + end
    for start in (
        "Al", "Bren", "Cor", "Dal", "Es", "Fen", "Gar", "Hol", "Ist", "Jor", "Kel", "Lum", "Mer",
        "Nor", "Os", "Pel", "Quin", "Ros", "Sol", "Tar", "Ul", "Ver", "Wen", "Yar", "Zan",
    )
    for end in (
        "a", "burg", "co", "den", "elle", "fax", "gora", "ia", "ix", "land", "mont", "nova", "o",
        "ora", "ric", "stad", "ton", "vik", "wood", "za",
    )
)
# fmt: on
