"""The bytes behind a vocabulary's entry for a token that is no text by itself."""

from __future__ import annotations

import re

#: How vocabularies with byte fallback, as Llama 2's, write a byte.
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in vocabularies of the byte level, as GPT-2's: printable
    Latin-1 for itself, and what follows Latin-1 for the rest in its order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def token_bytes(entry: str) -> bytes:
    """``<0xE2>`` is a byte; what is in the alphabet of the byte level has a byte a character; any
    other entry is its own UTF-8."""
    if found := _BYTE.fullmatch(entry):
        return bytes([int(found[1], 16)])
    if all(character in _ALPHABET for character in entry):
        return bytes(_ALPHABET[character] for character in entry)
    return entry.encode()
