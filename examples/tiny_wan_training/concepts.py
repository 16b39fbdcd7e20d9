"""The concepts the tiny model is taught, and the sentences that name them.

The left column is the Unicode name in upper case as `emoji.json` spells it, which is how a clip is
found; the right column is the prompt. Where the two agree only the name is given.
"""

from __future__ import annotations

#: Names used as they are.
PLAIN = """
grinning face; crying face; loudly crying face; angry face; thinking face; winking face; nerd face;
hugging face; sleeping face; freezing face; nauseated face; sneezing face; clown face; yawning face;
zipper-mouth face; money-mouth face; astonished face; fearful face; grimacing face; dizzy face;
lying face; drooling face; robot face; ghost; skull; alien monster; pile of poo; imp;
broken heart; beating heart; blue heart; green heart; yellow heart; purple heart; black heart;
orange heart; heart with arrow; revolving hearts; speak-no-evil monkey; see-no-evil monkey;
frog face; bird; baby chick; chicken; duck; eagle; flamingo; hatching chick; owl; parrot; peacock;
penguin; rooster; swan; ant; beetle; butterfly; honeybee; lady beetle; scorpion; snail; spider;
spider web; worm; bat; bear face; black cat; cat; cat face; cow; cow face; deer; dog face; elephant;
fox face; gorilla; hedgehog; horse; kangaroo; koala; lion face; llama; monkey; monkey face;
mouse face; orangutan; panda face; paw prints; pig face; polar bear; rabbit; rabbit face; raccoon;
sheep; skunk; sloth; tiger; tiger face; wolf face; zebra face; blowfish; crab; dolphin; fish;
lobster; octopus; seal; shark; shrimp; squid; tropical fish; whale; crocodile; dragon; lizard;
snake; t-rex; turtle; wilted flower; barber pole; ferris wheel; cloud with rain; comet; cyclone;
fire; glowing star; rainbow; ringed planet; snowflake; snowman; tornado; alarm clock; hourglass;
airplane; flying saucer; helicopter; parachute; rocket; police car; automobile; fire engine; bus;
steam locomotive; tractor; sailboat; christmas tree; jack-o-lantern; teddy bear; beer mug;
birthday cake; bomb
"""

#: Names that deserve a shorter prompt.
RENAMED = {
    "face with tears of joy": "laughing face",
    "rolling on the floor laughing": "rolling laughing face",
    "smiling face with sunglasses": "cool face with sunglasses",
    "smiling face with heart-shaped eyes": "face with heart eyes",
    "grinning face with star eyes": "face with star eyes",
    "face throwing a kiss": "kissing face",
    "face screaming in fear": "screaming face",
    "face with cowboy hat": "cowboy hat face",
    "face with party horn and party hat": "party face",
    "face with medical mask": "face with mask",
    "face with monocle": "monocle face",
    "smiling face with halo": "angel face",
    "shocked face with exploding head": "exploding head",
    "extraterrestrial alien": "green alien",
    "heavy black heart": "red heart",
    "black sun with rays": "sun",
    "cloud with lightning": "lightning cloud",
    "white medium star": "yellow star",
    "unicorn face": "unicorn",
    "water wave": "ocean wave",
    "triangular flag on post": "red flag",
}

#: Ways to say a prompt; the first is the one used to sample.
TEMPLATES = ("{}", "a video of a {}", "animated {} emoji")


def wanted() -> dict[str, str]:
    """Map every Unicode name (lower case) to its prompt."""
    plain = [" ".join(name.split()) for name in PLAIN.replace("\n", " ").split(";")]
    names = {name: name for name in plain if name}
    names.update(RENAMED)
    return names


def sentences(prompts: list[str]) -> list[list[str]]:
    """For every prompt, the sentences that may stand for it in training."""
    return [[template.format(prompt) for template in TEMPLATES] for prompt in prompts]
