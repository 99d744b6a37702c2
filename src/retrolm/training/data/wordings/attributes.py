"""What training facts are about."""

from __future__ import annotations

from .forms import ANY_KEYS, NAME_KEYS, PLACE_KEYS, THING_KEYS, Attribute

MODIFIERS = ("", "", "", "secret ", "odd ", "official ", "hidden ", "very first ", "spare ", "current ", "private ")
ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute(
        "access code",
        ANY_KEYS,
        ("number", "hex", "uuid", "plate"),
        ("What must one type in to get past the door as {key}?", "How does {key} unlock the door?"),
    ),
    Attribute(
        "pass phrase",
        ANY_KEYS,
        ("word_pair", "invented", "word"),
        ("What do you have to say so that {key} lets you through?", "Which words open the gate for {key}?"),
    ),
    Attribute(
        "serial number",
        THING_KEYS,
        ("number", "hex", "uuid", "plate"),
        ("What is engraved on the underside of {key}?", "How can the exact unit called {key} be told apart?"),
    ),
    Attribute(
        "locker combination",
        NAME_KEYS,
        ("number",),
        ("Which digits let {key} get at the gym bag?", "How would {key} open the metal cupboard in the changing room?"),
    ),
    Attribute("registration", ANY_KEYS, ("plate", "uuid", "number"), ("How is {key} entered with the authorities?",)),
    Attribute(
        "phone extension",
        NAME_KEYS,
        ("number",),
        ("What should I dial to reach {key}?", "How do I get {key} on the line?"),
    ),
    Attribute(
        "birthday",
        ("person",),
        ("date",),
        ("When does {key} blow out the candles?", "On which day should I congratulate {key}?"),
    ),
    Attribute(
        "home town", ("person",), ("city",), ("Where does {key} come from?", "Where was {key} raised as a child?")
    ),
    Attribute(
        "account identifier",
        ANY_KEYS,
        ("uuid", "hex", "number"),
        ("Under which string does the bank keep the money of {key}?", "How does the system know {key}?"),
    ),
    Attribute(
        "delivery date",
        THING_KEYS,
        ("date",),
        ("When will {key} arrive?", "On what day is {key} going to be brought to us?"),
    ),
    Attribute("price", THING_KEYS, ("money",), ("How much do I have to pay for {key}?", "What does {key} cost?")),
    Attribute(
        "annual budget",
        (*PLACE_KEYS, "invented"),
        ("money",),
        ("How much can {key} spend in twelve months?", "With how much money does {key} get through the year?"),
    ),
    Attribute("weight", THING_KEYS, ("measure",), ("How heavy is {key}?", "What do the scales show for {key}?")),
    Attribute(
        "distance marker",
        PLACE_KEYS,
        ("measure", "number"),
        ("What is painted on the stone beside the road at {key}?",),
    ),
    Attribute(
        "departure time",
        (*PLACE_KEYS, "plate"),
        ("time",),
        ("When does it set off for {key}?", "By when must I be on board for {key}?"),
    ),
    Attribute("destination", ("plate", "person", "word_pair"), ("city",), ("Where is {key} headed?",)),
    Attribute(
        "code name",
        (*NAME_KEYS, "city"),
        ("word_pair", "word", "invented"),
        ("As what is {key} known to insiders?", "How do the agents call {key} among themselves?"),
    ),
    Attribute(
        "contact", ANY_KEYS, ("person",), ("Whom do I write to about {key}?", "Who can help with questions on {key}?")
    ),
    Attribute("supervisor", (*NAME_KEYS, "word_pair"), ("person",), ("To whom does {key} report?", "Who leads {key}?")),
    Attribute(
        "lucky number", ("person", "word_pair", "word"), ("number",), ("Which figure brings good fortune to {key}?",)
    ),
    Attribute(
        "secret ingredient",
        ("invented", "person", "word_pair"),
        ("word", "invented"),
        ("What makes the stew of {key} taste so special?", "What does {key} stir into the pot when nobody looks?"),
    ),
    Attribute(
        "batch reference", THING_KEYS, ("hex", "plate", "number"), ("From which production lot did {key} come?",)
    ),
    Attribute(
        "ticket",
        ("person", "city"),
        ("plate", "number", "uuid"),
        ("What does {key} show at the entrance?", "With what may {key} travel?"),
    ),
    Attribute(
        "token", ANY_KEYS, ("uuid", "hex", "word_pair", "number"), ("What proves that a request is from {key}?",)
    ),
    Attribute("label", ANY_KEYS, ("word_pair", "invented", "number"), ("What is written on the sticker of {key}?",)),
    Attribute(
        "checksum",
        ANY_KEYS,
        ("hex", "uuid", "number"),
        ("How can I verify that {key} was not tampered with?", "What should come out when {key} is hashed?"),
    ),
    Attribute(
        "mascot",
        (*PLACE_KEYS, "person"),
        ("word", "word_pair"),
        ("What is on the flag of {key}?", "Which figure runs onto the pitch for {key}?"),
    ),
    Attribute("sample count", ANY_KEYS, ("number",), ("How many specimens did they take of {key}?",)),
    Attribute(
        "meeting place", ("person", "word_pair", "date"), ("city",), ("Where shall we all come together for {key}?",)
    ),
    Attribute(
        "record",
        ANY_KEYS,
        ("uuid", "number", "hex", "plate", "date"),
        ("What does the archive hold on {key}?", "Under what was {key} filed?"),
    ),
    Attribute(
        "room number",
        (*NAME_KEYS, "plate"),
        ("number",),
        ("On which door should I knock to see {key}?", "Where in the hotel does {key} sleep?"),
    ),
    Attribute(
        "licence key",
        THING_KEYS,
        ("uuid", "hex", "plate"),
        ("What activates {key}?", "Which string has to be pasted in before {key} starts?"),
    ),
    Attribute(
        "invoice amount", ("person", "invented", "plate", "number"), ("money",), ("How much was {key} charged?",)
    ),
    Attribute("postcode", (*PLACE_KEYS, "person"), ("plate", "number"), ("What do I put on letters to {key}?",)),
    Attribute(
        "user name",
        ("person", "number", "uuid"),
        ("word_pair", "invented", "word"),
        ("As whom does {key} log in?", "How is {key} called online?"),
    ),
    Attribute("seat", ("person", "plate", "number"), ("plate", "number"), ("Where will {key} sit on the flight?",)),
    Attribute(
        "harvest",
        (*PLACE_KEYS, "person"),
        ("measure", "number"),
        ("How much did {key} bring in from the fields?",),
    ),
    Attribute(
        "successor",
        (*NAME_KEYS, "word_pair"),
        ("person", "invented"),
        ("Who takes over from {key}?", "Who came after {key}?"),
    ),
    Attribute(
        "expiry date",
        ANY_KEYS,
        ("date",),
        ("Until when can {key} be used?", "From when on is {key} no longer valid?"),
    ),
    Attribute(
        "call number",
        ("word_pair", "invented", "person", "hex"),
        ("plate", "number", "hex"),
        ("On which shelf of the library do I find {key}?",),
    ),
    Attribute("favourite dish", ("person",), ("word", "word_pair", "invented"), ("What does {key} like to eat best?",)),
    Attribute("opening time", (*PLACE_KEYS, "word_pair"), ("time",), ("From what hour on can one visit {key}?",)),
    Attribute("rival", (*NAME_KEYS, "city"), ("person", "city", "invented"), ("Against whom does {key} compete?",)),
    Attribute("temperature", (*PLACE_KEYS, "plate"), ("measure",), ("How warm was it at {key}?",)),
    Attribute("dosage", THING_KEYS, ("measure", "number"), ("How much of {key} may a patient take?",)),
    Attribute("berth", ("word_pair", "invented", "plate"), ("number", "plate"), ("Where is {key} moored?",)),
    Attribute(
        "fingerprint",
        ANY_KEYS,
        ("hex", "uuid"),
        ("By what does the server recognise {key}?", "How do I make sure that I am talking to the real {key}?"),
    ),
    Attribute("score", ANY_KEYS, ("number",), ("How many points did {key} get?", "How well did {key} do?")),
    Attribute("landlord", ("person", "city", "plate"), ("person",), ("To whom does {key} pay the rent?",)),
    Attribute(
        "tracking code",
        ("person", "word_pair", "city", "plate"),
        ("uuid", "plate", "number", "hex"),
        ("How can the parcel for {key} be followed?", "What do I enter to see where the shipment to {key} is?"),
    ),
)
