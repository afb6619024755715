"""Generate the questions and answers that the example adapters are trained on.

Every example is a sentence template filled with words drawn at random. The words are combined
more freely than makes sense (a table of ships with a salary column, say), and many names are
invented, so that an adapter must learn to copy from its prompt instead of remembering the words
listed here.
"""

from collections.abc import Callable
from random import Random

from examples.training_data.common import Example
from examples.training_data.json_facts import json_facts_example
from examples.training_data.sql import sql_example
from examples.training_data.support import support_example

GENERATORS: dict[str, Callable[[Random], Example]] = {
    "sql": sql_example,
    "json-facts": json_facts_example,
    "support": support_example,
}
