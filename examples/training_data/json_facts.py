"""Examples for the `json-facts` adapter: a described thing becomes one JSON object of facts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from string import Formatter

from examples.training_data.common import INVENTED_NAMES, Example

# fmt: off
FACTS: dict[str, Sequence[str] | Sequence[int]] = {
    "age": range(18, 90),
    "animal": (
        "horse", "parrot", "cat", "rabbit", "goat", "tortoise", "dog", "hedgehog", "llama",
        "owl", "ferret", "pigeon", "camel", "lizard", "otter", "pony", "goose", "badger", "mule",
        "sparrow", "hamster", "raven", "sheep", "turkey", "buffalo", "squirrel", "panther",
    ),
    "author": ("Lena Fischer", "Tom Adeyemi", "Rosa Almeida", "Ian Craig", "Yuki Mori"),
    "birth_year": range(1700, 2005),
    "built": range(1200, 2020),
    "capacity": range(20, 900, 10),
    "city": (
        "Turin", "Bergen", "Quito", "Osaka", "Denver", "Tunis", "York", "Gdansk", "Nairobi",
        "Lyon", "Seville", "Basel", "Toronto", "Jakarta", "Haifa", "Malmo", *INVENTED_NAMES[::37],
    ),
    "colour": (
        "red", "blue", "grey", "black", "white", "green", "golden", "brown", "pink", "purple",
        "silver", "turquoise", "beige",
    ),
    "country": (
        "Norway", "Chile", "Japan", "Ghana", "Canada", "Italy", "Vietnam", "Ireland", "Turkey",
        "Mexico", "Latvia", "Nepal", "Australia", "Senegal", "Portugal", "Jordan",
    ),
    "crop": ("olives", "barley", "apples", "lavender", "rice", "grapes", "potatoes", "tea"),
    "cuisine": ("Thai", "Mexican", "Greek", "Indian", "French", "Lebanese", "Korean", "Polish"),
    "crew": range(2, 60),
    "director": ("Nora Lindqvist", "Paul Mensah", "Clara Ruiz", "Dev Kapoor"),
    "employees": range(3, 5000, 7),
    "food": ("hay", "seeds", "fish", "carrots", "berries", "leaves", "insects", "corn", "nuts"),
    "founded": range(1700, 2022),
    "genre": ("thriller", "comedy", "romance", "mystery", "western", "satire", "drama", "fable"),
    "height_m": range(4, 320, 3),
    "instrument": ("cello", "piano", "trumpet", "harp", "guitar", "flute", "oboe", "banjo"),
    "language": (
        "Dutch", "Arabic", "Polish", "Swahili", "Korean", "Spanish", "Hindi", "Czech", "Welsh",
    ),
    "launched": range(1650, 2022),
    "length_km": range(12, 2400, 9),
    "length_m": range(3, 400, 2),
    "material": (
        "oak", "steel", "bamboo", "granite", "brass", "plastic", "wool", "marble", "clay",
        "titanium", "glass", "limestone", "pine",
    ),
    "minutes": range(10, 180, 5),
    "month": ("January", "March", "April", "June", "August", "September", "October", "November"),
    "object": (
        "lamp", "kettle", "chair", "bicycle", "clock", "tent", "backpack", "radio", "scooter",
        "umbrella", "telescope", "kayak", "blender", "sofa", "typewriter", "drone", "hammer",
        "mirror", "wheelbarrow", "toaster", "carpet", "candle", "violin", "ladder", "bucket",
        "helmet", "printer", "statue", "wardrobe", "necklace", "compass", "drum", "sleeping bag",
    ),
    "occupation": (
        "baker", "chemist", "pilot", "lawyer", "sculptor", "nurse", "geologist", "farmer",
        "painter", "translator", "carpenter", "diplomat", "historian", "plumber", "judge",
    ),
    "owner": ("Mrs Hall", "Mr Petrov", "the Jansen family", "Dr Amari", "Uncle Ben"),
    "pages": range(90, 900, 11),
    "plant": ("rose", "fern", "cactus", "lily", "orchid", "maple", "palm", "daisy", "thistle"),
    "population": range(900, 90000, 700),
    "price_euros": range(5, 900, 3),
    "product": (
        "bread", "solar panels", "shoes", "cheese", "sailing boats", "games", "pens", "carpets",
        "maps", "violins", "soap", "tractors",
    ),
    "river": ("Elbe", "Tagus", "Drina", "Shannon", "Loire", "Oder", *INVENTED_NAMES[::41]),
    "sea": ("Baltic Sea", "Black Sea", "North Sea", "Adriatic Sea"),
    "servings": range(2, 12),
    "structure": (
        "lighthouse", "library", "theatre", "castle", "mill", "chapel", "fortress", "museum",
        "monastery", "tower", "palace", "school",
    ),
    "style": ("Gothic", "Baroque", "modern", "Romanesque", "brick", "timber"),
    "top_speed_kmh": range(60, 320, 5),
    "warranty_years": range(1, 10),
    "vessel": ("ferry", "yacht", "trawler", "frigate", "canoe", "steamer", "icebreaker", "barge"),
    "visitors": range(200, 90000, 700),
    "weight_kg": range(1, 700, 2),
    "year": range(1920, 2024),
}
# fmt: on

SURNAMES = ("Moreno", "Solberg", "Tanaka", "Okoro", "Popa", "Martin", *INVENTED_NAMES[::9])
WOMEN = [f"{name} {surname}" for name in ("Ada", "Ingrid", "Mei", "Ruth") for surname in SURNAMES]
MEN = [f"{name} {surname}" for name in ("Karl", "Hugo", "Sanjay", "Amir") for surname in SURNAMES]
HOUSES = [f"{name} {word}" for name in INVENTED_NAMES[::11] for word in ("House", "Hall", "Fort")]
TITLES = ("The Last Ferry", "Quiet Water", "A Winter Map", "Paper Kings", "The Glass Orchard")
DISHES = ("Golden Soup", "Harvest Pie", "Pepper Stew", "Lemon Rice", "Red Dumplings")


@dataclass(frozen=True)
class Kind:
    """One kind of thing to describe: an opening sentence, and more facts to go on with."""

    names: Sequence[str]
    openings: Sequence[str]
    pronoun: str
    more: Sequence[str]


KINDS = (
    Kind(
        names=WOMEN,
        openings=("{name} is a {occupation} from {city}", "{name}, a {occupation}, is {age}"),
        pronoun="She",
        more=("speaks {language}", "keeps a {animal}", "was born in {birth_year}"),
    ),
    Kind(
        names=MEN,
        openings=("{name} was a {occupation} born in {birth_year} in {city}",),
        pronoun="He",
        more=("moved to {country}", "played the {instrument}", "lived to the age of {age}"),
    ),
    Kind(
        names=INVENTED_NAMES,
        openings=("{name} is a {colour} {animal}", "{name} is the {animal} of {owner}"),
        pronoun="It",
        more=("weighs {weight_kg} kg", "eats {food}", "lives in {city}"),
    ),
    Kind(
        names=INVENTED_NAMES,
        openings=(
            "{name} is a town in {country} with {population} inhabitants",
            "The town of {name} lies on the {river}",
        ),
        pronoun="It",
        more=("was founded in {founded}", "is known for its {product}", "grows {crop}"),
    ),
    Kind(
        names=INVENTED_NAMES,
        openings=(
            "The {name} is a {colour} {object} made of {material}",
            "The {name} is a {object} from {country}",
        ),
        pronoun="It",
        more=(
            "costs {price_euros} euros",
            "weighs {weight_kg} kg",
            "comes with a warranty of {warranty_years} years",
        ),
    ),
    Kind(
        names=INVENTED_NAMES,
        openings=("The {name} is a {colour} car with a top speed of {top_speed_kmh} km/h",),
        pronoun="It",
        more=("was built in {built}", "belongs to {owner}", "costs {price_euros} euros"),
    ),
    Kind(
        names=TITLES,
        openings=(
            "{name} is a {genre} by {author}",
            "{author} published the {genre} {name} in {year}",
        ),
        pronoun="It",
        more=("has {pages} pages", "is set in {city}", "was written in {language}"),
    ),
    Kind(
        names=TITLES,
        openings=("{name} is a {genre} film from {year}", "{director} directed the film {name}"),
        pronoun="It",
        more=("lasts {minutes} minutes", "was shot in {country}"),
    ),
    Kind(
        names=HOUSES,
        openings=(
            "{name} is a {structure} in {city}, built in {built}",
            "{name} is a {style} {structure} made of {material}",
        ),
        pronoun="It",
        more=("is {height_m} m high", "seats {capacity} people", "belongs to {owner}"),
    ),
    Kind(
        names=INVENTED_NAMES,
        openings=(
            "{name} is a company in {city} that makes {product}",
            "{name}, founded in {founded}, makes {product}",
        ),
        pronoun="It",
        more=("has {employees} employees", "exports to {country}"),
    ),
    Kind(
        names=INVENTED_NAMES,
        openings=("The {name} is a river in {country}, {length_km} km long",),
        pronoun="It",
        more=("flows into the {sea}", "passes {city}"),
    ),
    Kind(
        names=INVENTED_NAMES,
        openings=("The {name} is a {colour} {vessel} launched in {launched}",),
        pronoun="It",
        more=("carries a crew of {crew}", "sails to {country}", "is {length_m} m long"),
    ),
    Kind(
        names=INVENTED_NAMES,
        openings=("{name} is a festival held in {city} every {month}",),
        pronoun="It",
        more=("draws {visitors} visitors", "was founded in {founded}"),
    ),
    Kind(
        names=INVENTED_NAMES,
        openings=("The {name} is a {plant} from {country}",),
        pronoun="It",
        more=("flowers in {month}", "grows {height_m} m high", "has {colour} leaves"),
    ),
    Kind(
        names=DISHES,
        openings=("{name} is a {cuisine} dish that takes {minutes} minutes to cook",),
        pronoun="It",
        more=("serves {servings} people", "costs {price_euros} euros"),
    ),
)

FACT_QUESTIONS = (
    "What do we know about {name}?",
    "Tell me about {name}.",
    "Which facts are given here?",
    "Can you describe {name}?",
    "What is this about?",
    "Summarise this.",
    "Who or what is {name}?",
)


def json_facts_example(random: Random) -> Example:
    """Describe one thing in two sentences, and answer with its facts in the order given."""
    kind = random.choice(KINDS)
    more = random.sample(kind.more, random.randint(1, 2))
    template = f"{random.choice(kind.openings)}. {kind.pronoun} {' and '.join(more)}."
    keys = [field for _, field, _, _ in Formatter().parse(template) if field]
    facts = {key: random.choice(kind.names if key == "name" else FACTS[key]) for key in keys}
    description = template.format(**facts)
    question = random.choice(FACT_QUESTIONS).format(**facts)
    return Example(f"{description} {question}", json.dumps(facts, separators=(",", ":")))
