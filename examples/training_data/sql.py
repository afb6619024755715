"""Examples for the `sql` adapter: a question about a named table becomes one query."""

from collections.abc import Sequence
from random import Random

from examples.training_data.common import INVENTED_NAMES, Example

SCHEMAS = (
    "Table {table}({columns}). {question}",
    "Given a table {table} with the columns {columns}: {question}",
)

TABLES = (
    "books", "orders", "employees", "customers", "flights", "songs", "invoices", "students",
    "cars", "houses", "tickets", "recipes", "players", "machines", "meetings", "payments",
    "parcels", "ships", "farms", "courses", "devices", "museums", "loans", "photos", "teachers",
    "rivers", "suppliers", "tools", "visits", "wines", "apartments", "bridges", "cities",
    "doctors", "events", "factories", "games", "horses", "islands", "journeys", "kitchens",
    "lectures", "mountains", "nurses", "offices", "projects", "queues", "restaurants", "shops",
    "trees", "universities", "vehicles", "warehouses", "yachts", "animals", "contracts",
)  # fmt: skip

TEXT_COLUMNS: dict[str, Sequence[str]] = {
    "city": ("Paris", "Oslo", "Lima", "Kyoto", "Boston", "Cairo", "Leeds", "Porto"),
    "country": ("Norway", "Peru", "Japan", "Egypt", "Kenya", "Brazil", "Poland", "India"),
    "colour": ("red", "blue", "green", "black", "white", "yellow", "silver"),
    "status": ("open", "closed", "late", "paid", "pending", "shipped", "cancelled"),
    "name": ("Anna", "Bruno", "Chen", "Dalia", "Emil", "Farah", "Goran", "Hanna"),
    "owner": ("Smith", "Novak", "Garcia", "Okafor", "Tanaka", "Dubois", "Rossi"),
    "category": ("garden", "sports", "music", "office", "toys", "kitchen", "travel"),
    "department": ("Sales", "Finance", "Research", "Support", "Legal", "Marketing"),
    "language": ("German", "Spanish", "Arabic", "Korean", "Swedish", "Hindi", "Greek"),
    "brand": ("Nordel", "Kasumi", "Brightway", "Oberon", "Tessal", "Quanta"),
    "size": ("small", "medium", "large", "tiny", "huge"),
    "weekday": ("Monday", "Tuesday", "Thursday", "Friday", "Sunday"),
    "material": ("wood", "steel", "glass", "cotton", "leather", "copper"),
    "first_name": ("Maria", "Omar", "Ivy", "Jonas", "Lucia", "Pavel"),
    "level": ("beginner", "advanced", "expert", "junior", "senior"),
    "region": ("north", "south", "coast", "alps", "valley", "midlands"),
    "payment_method": ("cash", "card", "cheque", "transfer", "voucher"),
    "title": ("Dune", "Emma", "Persuasion", "Ulysses", "Ivanhoe", "Kim"),
    "author": ("Austen", "Borges", "Camus", "Dickens", "Eco", "Atwood"),
    "carrier": ("Hermes", "Swift", "Atlas", "Pony", "Falcon"),
    "crop": ("wheat", "maize", "barley", "rye", "oats"),
    "delivery_date": ("2024-03-01", "2023-11-15", "2025-01-20", "2022-07-09"),
    "engine": ("diesel", "petrol", "electric", "hybrid", "steam"),
    "job": ("baker", "clerk", "driver", "cook", "tailor", "pilot"),
    "nationality": ("Danish", "Chilean", "Irish", "Turkish", "Cuban"),
    "sport": ("tennis", "hockey", "rowing", "judo", "golf"),
    "street": ("Elm Street", "High Road", "Mill Lane", "Park Avenue"),
    "type": ("basic", "premium", "trial", "family", "single"),
}

NUMBER_COLUMNS = (
    "price", "age", "weight", "salary", "quantity", "rating", "distance", "duration", "height",
    "year", "total", "discount", "unit_price", "page_count", "speed", "capacity", "score",
    "stock", "delay_minutes", "bonus", "floor", "length", "rent", "tax_rate", "doors", "points",
    "members", "rooms", "visitors", "pages", "hours", "employees", "amount", "population",
    "budget", "copies_sold", "depth", "goals", "power", "width",
)  # fmt: skip

COMPARISONS = {
    "above": ">", "over": ">", "more than": ">", "greater than": ">",
    "below": "<", "under": "<", "less than": "<", "lower than": "<",
    "at least": ">=", "at most": "<=",
}  # fmt: skip

FUNCTIONS = {"average": "AVG", "total": "SUM", "highest": "MAX", "lowest": "MIN"}

DIRECTIONS = {"highest": "DESC", "largest": "DESC", "lowest": "ASC", "smallest": "ASC"}

# Each query goes with several ways to ask for it; in {text_words} "unit_price" is "unit price".
QUERIES: dict[str, Sequence[str]] = {
    "SELECT COUNT(*) FROM {table};": (
        "How many {table} are there?",
        "Count all {table}.",
        "What is the number of {table}?",
    ),
    "SELECT {text}, COUNT(*) FROM {table} GROUP BY {text};": (
        "How many {table} are there for each {text_words}?",
        "Count the {table} per {text_words}.",
        "What is the number of {table} in each {text_words}?",
    ),
    "SELECT {function}({number}) FROM {table};": (
        "What is the {function_word} {number_words} of all {table}?",
        "Find the {function_word} {number_words}.",
    ),
    "SELECT {text}, {function}({number}) FROM {table} GROUP BY {text};": (
        "What is the {function_word} {number_words} for each {text_words}?",
        "Show the {function_word} {number_words} of the {table} per {text_words}.",
    ),
    "SELECT {function}({number}) FROM {table} WHERE {text} = '{value}';": (
        "What is the {function_word} {number_words} of {table} whose {text_words} is {value}?",
        "Find the {function_word} {number_words} where the {text_words} is {value}.",
    ),
    "SELECT * FROM {table} WHERE {number} {operator} {amount};": (
        "Which {table} have a {number_words} {comparison} {amount}?",
        "Show all {table} whose {number_words} is {comparison} {amount}.",
        "Which {table} have {comparison} {amount} {number_words}?",
        "Find the {table} with {comparison} {amount} {number_words}.",
    ),
    "SELECT * FROM {table} WHERE {text} = '{value}';": (
        "Which {table} have the {text_words} {value}?",
        "Show all {table} whose {text_words} is {value}.",
        "Find the {table} with {text_words} {value}.",
    ),
    "SELECT {other} FROM {table} WHERE {text} = '{value}';": (
        "What is the {other_words} of the {table} with the {text_words} {value}?",
        "Show the {other_words} of all {table} whose {text_words} is {value}.",
    ),
    "SELECT {text}, {number} FROM {table} ORDER BY {number} {direction} LIMIT {limit};": (
        "Show the {text_words} and {number_words} of the {limit} {table} with the "
        "{direction_word} {number_words}.",
        "List {text_words} and {number_words} for the {limit} {direction_word} "
        "{number_words} values.",
    ),
    "SELECT * FROM {table} ORDER BY {number} {direction} LIMIT {limit};": (
        "Which {limit} {table} have the {direction_word} {number_words}?",
        "List the {limit} {table} with the {direction_word} {number_words}.",
    ),
    "SELECT DISTINCT {text} FROM {table};": (
        "Which different {text_words} values are there?",
        "List every {text_words} once.",
        "What are the distinct {text_words} values of the {table}?",
    ),
    "SELECT COUNT(*) FROM {table} WHERE {number} {operator} {amount};": (
        "How many {table} have a {number_words} {comparison} {amount}?",
        "Count the {table} whose {number_words} is {comparison} {amount}.",
        "How many {table} have {comparison} {amount} {number_words}?",
    ),
    "SELECT COUNT(*) FROM {table} WHERE {text} = '{value}';": (
        "How many {table} have the {text_words} {value}?",
        "Count the {table} whose {text_words} is {value}.",
    ),
    "SELECT * FROM {table} WHERE {text} = '{value}' AND {number} {operator} {amount};": (
        "Which {table} have the {text_words} {value} and a {number_words} {comparison} {amount}?",
        "Show all {table} whose {text_words} is {value} and whose {number_words} is "
        "{comparison} {amount}.",
    ),
}


def sql_example(random: Random) -> Example:
    """Ask about a table with two text and two number columns, and answer with the query."""
    table = random.choice(TABLES)
    text, other = random.sample(list(TEXT_COLUMNS), 2)
    number, unused_number = random.sample(NUMBER_COLUMNS, 2)
    comparison, operator = random.choice(list(COMPARISONS.items()))
    function_word, function = random.choice(list(FUNCTIONS.items()))
    direction_word, direction = random.choice(list(DIRECTIONS.items()))
    query, questions = random.choice(list(QUERIES.items()))
    words = {
        "table": table,
        "text": text,
        "text_words": text.replace("_", " "),
        "other": other,
        "other_words": other.replace("_", " "),
        "number": number,
        "number_words": number.replace("_", " "),
        "value": random.choice(random.choice((TEXT_COLUMNS[text], INVENTED_NAMES))),
        "amount": random.choice((random.randint(2, 99), random.randint(1, 90) * 50)),
        "limit": random.randint(2, 20),
        "comparison": comparison,
        "operator": operator,
        "function_word": function_word,
        "function": function,
        "direction_word": direction_word,
        "direction": direction,
    }
    columns = [text, other, number, unused_number]
    random.shuffle(columns)
    prompt = random.choice(SCHEMAS).format(
        table=table,
        columns=", ".join(columns),
        question=random.choice(questions).format(**words),
    )
    return Example(prompt, query.format(**words))
