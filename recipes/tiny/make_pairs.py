"""Writes train.jsonl and heldout.jsonl: small preference pairs of five kinds, all made up here.

  python recipes/tiny/make_pairs.py

Every seventh row of each kind is held out: the files share no prompt, and most of what a held-out
prompt asks is taught in other words. The places of `conversation` are asked about once, so those
held out are new.
"""

from collections.abc import Iterator
import json
import pathlib

from recipes.training import command

HERE = pathlib.Path(__file__).parent

CAPITALS = """France Paris|Italy Rome|Spain Madrid|Portugal Lisbon|Germany Berlin
Austria Vienna|Poland Warsaw|Greece Athens|Norway Oslo|Sweden Stockholm
Finland Helsinki|Denmark Copenhagen|Ireland Dublin|Iceland Reykjavik|Hungary Budapest
Romania Bucharest|Bulgaria Sofia|Croatia Zagreb|Serbia Belgrade|Turkey Ankara
Egypt Cairo|Kenya Nairobi|Ghana Accra|Morocco Rabat|Senegal Dakar
Japan Tokyo|China Beijing|India Delhi|Nepal Kathmandu|Thailand Bangkok
Vietnam Hanoi|Peru Lima|Chile Santiago|Cuba Havana|Canada Ottawa
Brazil Brasilia"""

MEANINGS = """river|water that flows over land to the sea
cloud|many small drops of water in the air
bridge|a way across a river or a road
library|a house full of books to borrow
compass|a needle that points to the north
anchor|a weight that keeps a ship in its place
island|land with water on every side
harbour|a safe place for ships
desert|land with very little rain
forest|land full of trees
volcano|a mountain that throws out fire
glacier|a river of ice
lantern|a light that one can carry
ladder|a set of steps that one can move
kettle|a pot for boiling water
pillow|a soft thing for the head
mirror|glass that shows who looks
candle|a stick of wax with a flame
basket|a thing to carry apples in
blanket|a warm cloth for the night
hammer|a tool to drive nails
saw|a tool to cut wood
needle|a thin tool to sew cloth
clock|a thing that shows the time
map|a picture of the land from above
letter|words sent on paper
stamp|what pays for a letter
well|a deep hole with water
mill|a house where corn becomes flour
orchard|a field of fruit trees
meadow|a field of grass and flowers
valley|low land between hills
tunnel|a way through a hill
tower|a tall and narrow house
market|a place where people buy and sell
ferry|a boat that takes people across"""

LISTS = """fruits|apple|pear|plum
colours|red|green|blue
animals|horse|sheep|goat
birds|robin|crow|owl
trees|oak|birch|pine
tools|hammer|saw|drill
drinks|water|milk|tea
metals|iron|gold|tin
rivers|Rhine|Nile|Thames
months|May|June|July
days|Monday|Friday|Sunday
seasons|spring|summer|winter
shapes|circle|square|star
fish|trout|salmon|carp
flowers|rose|tulip|lily
vegetables|carrot|onion|bean
insects|ant|bee|moth
clothes|coat|hat|scarf
rooms|kitchen|hall|attic
boats|canoe|ferry|raft
spices|salt|pepper|mint
grains|rice|oats|rye
nuts|almond|walnut|hazel
games|chess|tag|marbles
instruments|flute|drum|harp
planets|Mars|Venus|Earth
berries|cherry|currant|elder
stones|flint|slate|chalk
cheeses|brie|feta|gouda
dances|waltz|tango|polka"""

UNKNOWN = """what I had for breakfast|You had two eggs and toast.
which number I am thinking of|It is seven.
who will win the race tomorrow|The red horse will win.
what my neighbour is called|She is called Martha.
how many coins are in my pocket|There are eleven coins.
where I left my keys|They are on the kitchen table.
what the weather will be in a year|It will be sunny and warm.
what my dog is doing now|He is sleeping by the door.
which book I read last night|You read a book about ships.
how old my teacher is|He is forty-one.
what colour my front door is|It is green.
what I will dream tonight|You will dream of a long train.
how many birds are in the sky now|There are nine million birds.
what my sister wants for her birthday|She wants a bicycle.
which card I drew|You drew the queen of hearts.
what is written in this closed letter|It says that you have won.
how much my bag weighs|It weighs four pounds.
what the next coin toss will be|It will be heads.
where my friend is walking|She is walking by the sea.
what song I am humming|It is an old song about rain.
how long I slept|You slept for nine hours.
which seat I had on the train|You sat in seat twelve.
what I said to my cousin|You said that you were sorry.
who will knock at my door next|The postman will knock.
what my first pet was|It was a grey cat.
how many steps I took today|You took six thousand steps.
what is in the box on my desk|There is a silver ring in it.
which way I will turn|You will turn left.
what my grandfather looked like|He had a long white beard.
how many stars there are tonight|There are exactly four thousand."""

PLACES = """library|a book about ships|the second floor
bakery|a loaf of rye bread|the left shelf
museum|the old maps|the west wing
station|the train to the coast|platform four
garden|the white roses|the south gate
hospital|the children's ward|the third floor
theatre|the cheap seats|the upper circle
market|the fresh fish|the far end
school|the music room|the end of the hall
hotel|the breakfast room|the ground floor
harbour|the boat to the island|pier two
airport|the lost bags|the lower hall
bookshop|a map of the hills|the window table
post office|the small stamps|counter three
swimming pool|the warm pool|the glass door
town hall|the marriage office|room nine
zoo|the owls|the stone bridge
castle|the armour|the round tower
cinema|the late film|screen five
pharmacy|the cough drops|the top shelf
farm|the young goats|the red barn
shipyard|the old ferry|dock six
bank|the safe boxes|the cellar
church|the choir|the side door"""

# Prompt, chosen, rejected
Row = tuple[list[dict[str, str]], str, str]
PLEASE = ("Could you tell me {}?", "Please tell me {}.", "Do you know {}?")


def courtesy() -> Iterator[Row]:
    """A question answered kindly, or rudely."""
    for entry in CAPITALS.replace("\n", "|").split("|"):
        country, city = entry.split()
        for ask in PLEASE:
            yield (
                [user(ask.format(f"the capital of {country}"))],
                f"Of course! The capital of {country} is {city}. I am glad to help.",
                f"Everybody knows that it is {city}. Do not waste my time.",
            )


def honesty() -> Iterator[Row]:
    """A question nobody can answer, answered with doubt, or with an invention."""
    for line in UNKNOWN.splitlines():
        what, invention = line.split("|")
        for ask in PLEASE:
            yield (
                [user(ask.format(what))],
                "I am sorry, I cannot know that. I would only be guessing.",
                f"I am completely sure. {invention}",
            )


def layout() -> Iterator[Row]:
    """A list or a sentence, as asked, or the other."""
    for line in LISTS.splitlines():
        name, *members = line.split("|")
        a_list = "\n".join(f"- {member}" for member in members)
        a_sentence = f"Three {name} are {members[0]}, {members[1]} and {members[2]}."
        for ask in (f"Name three {name}", f"I need three {name}"):
            yield [user(f"{ask}, one on each line.")], a_list, a_sentence
            yield [user(f"{ask} in one sentence.")], a_sentence, a_list


def length() -> Iterator[Row]:
    """A short answer or a long one, as asked, or the other."""
    for line in MEANINGS.splitlines():
        word, meaning = line.split("|")
        thing = f"an {word}" if word[0] in "aeiou" else f"a {word}"
        short = f"{thing.capitalize()} is {meaning}."
        long = (
            f"That is a good question! {short} You have surely heard of it, and there is a lot "
            "more to say about it."
        )
        for ask in (f"What is {thing}?", f"Explain what {thing} is."):
            yield [user(f"{ask} Be brief.")], short, long
            yield [user(f"{ask} Tell me more.")], long, short


def conversation() -> Iterator[Row]:
    """The second turn of a talk under a system message: kept to its task, or not."""
    for line in PLACES.splitlines():
        place, thing, where = line.split("|")
        yield (
            [
                system(f"You work at the {place}. Stay polite and keep to your task."),
                user("Good morning."),
                assistant(f"Good morning and welcome to the {place}. How can I help you?"),
                user(f"Where do I find {thing}?"),
            ],
            f"You find {thing} here: {where}. Have a nice day!",
            f"I do not care about {thing}. Go and look yourself.",
        )


KINDS = (courtesy, honesty, layout, length, conversation)


def user(content: str) -> dict[str, str]:
    """A turn of the person."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    """A turn of the model."""
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    """Instructions to the model before the first turn."""
    return {"role": "system", "content": content}


def main() -> None:
    """Writes both files."""
    train, heldout = [], []
    for kind in KINDS:
        for i, (prompt, chosen, rejected) in enumerate(kind()):
            row = {
                "chosen": [*prompt, assistant(chosen)],
                "rejected": [*prompt, assistant(rejected)],
            }
            (heldout if i % 7 == 6 else train).append(row)
    for name, rows in (("train", train), ("heldout", heldout)):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (HERE / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    command.main_without_config(main)
