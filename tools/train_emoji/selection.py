"""Which emoji the built-in models learn, and what people call them besides their Unicode names."""

from __future__ import annotations

import re

SYMBOLS = frozenset(
    """warning; no entry; prohibited; radioactive; biohazard; right arrow; left arrow; up arrow; down arrow; yin yang;
    peace symbol; atom symbol; infinity; recycling symbol; check mark button; cross mark; heavy dollar sign;
    red question mark; red exclamation mark; medical symbol; fleur-de-lis; trident emblem; play button; multiply; plus;
    red circle; orange circle; yellow circle; green circle; blue circle; purple circle; brown circle; black circle;
    white circle; red square; orange square; yellow square; green square; blue square; purple square; brown square;
    large orange diamond; large blue diamond; red triangle pointed up; eight-pointed star; sparkle; ATM sign;
    no smoking; wheelchair symbol; SOS button; NEW button; hundred points""".replace("\n    ", " ").split("; ")
)
PEOPLE = frozenset("man; woman; man dancing; woman dancing; mermaid; merman; old man; old woman; boy; girl".split("; "))
"""Of those that come as men and as women only these are taken."""
LEFT_OUT_PEOPLE = re.compile(
    r"(man|woman|men|women|deaf|kiss|couple|family|people with|pregnant|breast|middle finger|woman and|mx |"
    r"person (beard|blond|bald|red|curly|white|feeding|kneeling|frowning|pouting|in (manual|motorized))|"
    r"rightwards|leftwards|palm|backhand index|left-facing|right-facing|raised back|hand with index)"
)
LEFT_OUT_PLACES = re.compile(
    r"o’clock|-thirty|japanese (post|castle)|map of japan|globe showing (asia|europe)|love hotel|"
    r"quarter|waxing|waning|oncoming|kaaba"
)
LEFT_OUT_OBJECTS = re.compile(
    r"mailbox|locked with|card index|yen|euro|pound banknote|inbox|outbox|incoming env|"
    r"speaker (low|medium)|tilted right|bell with slash|cigarette|fax|pager|trackball"
)
UNWANTED_WORDS = re.compile(
    r"sex|porn|virgin|drunk|drug|death|dead|kill|murder|nazi|fat|ugly|gun|terror|butt|poop|period"
)
"""Words of emojilib that hold one of these are not taken as names."""

ALIASES: dict[str, tuple[str, ...]] = {
    name: tuple(words.split("|"))
    for name, words in (
        line.strip().split(": ")
        for line in """
        automobile: car
        honeybee: bee
        hamburger: burger
        airplane: plane
        doughnut: donut
        television: tv
        red heart: heart
        evergreen tree: pine tree
        deciduous tree: tree
        pile of poo: poo
        bicycle: bike
        lady beetle: ladybug
        chequered flag: flag
        spouting whale: whale spouting water
        hot beverage: cup of coffee|coffee
        sailboat: sailing boat|boat
        mobile phone: phone|smartphone
        house with garden: house and tree
        french fries: fries|chips
        wrapped gift: gift|present
        high voltage: lightning bolt|lightning
        fire engine: fire truck
        cloud with rain: rain cloud
        cloud with snow: snow cloud
        jack-o-lantern: halloween pumpkin|pumpkin
        soccer ball: football
        american football: rugby
        flying saucer: ufo
        sauropod: dinosaur
        t-rex: tyrannosaurus
        birthday cake: cake
        ear of corn: corn
        eggplant: aubergine
        personal computer: computer
        laptop: notebook computer
        desktop computer: computer|pc
        money bag: bag of money
        musical note: note
        artist palette: palette
        teddy bear: plush bear
        snow-capped mountain: snowy mountain
        locomotive: steam train
        motor scooter: scooter
        crescent moon: moon
        sun with face: smiling sun
        new moon face: dark moon face
        smiling face with sunglasses: cool face|face with sunglasses
        face with tears of joy: laughing face
        loudly crying face: crying loudly
        smiling face with heart-eyes: face in love
        smiling face with horns: devil
        grinning face: happy face|smiley
        slightly smiling face: smile
        alien monster: space invader
        glass of milk: milk
        clinking beer mugs: beers|cheers
        beer mug: beer
        wine glass: glass of wine|wine
        soft ice cream: ice cream cone
        trophy: cup
        light bulb: lamp|bulb
        alarm clock: clock
        gem stone: diamond|gem
        red apple: apple
        blossom: flower
        baby chick: chick
        dog: doggy|puppy
        cat: kitty|kitten
        cat face: face of a cat|head of a cat
        dog face: face of a dog|head of a dog
        horse face: head of a horse
        pig face: head of a pig
        cow face: head of a cow
        rabbit: bunny
        robot: robot head
        cut of meat: steak
        chocolate bar: chocolate
        pizza: slice of pizza
        pool 8 ball: billiard ball
        video game: game controller|gamepad
        closed umbrella: folded umbrella
        closed book: book|red book
        couch and lamp: sofa and lamp
        racing car: race car
        sport utility vehicle: suv
        delivery truck: truck|lorry
        rocket: spaceship
        necktie: tie
        high-heeled shoe: high heel
        man’s shoe: shoe
        running shoe: sneaker
        t-shirt: shirt
        billed cap: cap|baseball cap
        woman’s hat: hat
        military helmet: helmet
        locked: padlock|lock
        dagger: knife
        police car: cop car
        droplet: drop of water|water drop
        water wave: wave
        fire: flame
        full moon: round moon
        globe showing americas: earth|globe
        wastebasket: trash can
        pencil: yellow pencil
        spiral shell: shell
        evergreen: pine
        """.strip().splitlines()
    )
}


def is_wanted(name: str, group: str) -> bool:
    """Whether an emoji is taken, by its Unicode name and group: no flags, few symbols, no near doubles."""
    lower = name.lower()
    if group == "Symbols":
        return name in SYMBOLS
    if group == "People & Body":
        return name in PEOPLE or not (LEFT_OUT_PEOPLE.match(lower) or "facing right" in lower)
    left_out = {"Travel & Places": LEFT_OUT_PLACES, "Objects": LEFT_OUT_OBJECTS}.get(group)
    return group != "Flags" and not (left_out and left_out.search(lower))
