"""What the simulated questions are about: tasks of daily life, and what there is to say about each."""

from __future__ import annotations

from typing import NamedTuple


class Topic(NamedTuple):
    """What there is to say about one task, in phrases that fit into sentences. None speaks of "you" or "I"."""

    task: str  # an infinitive
    steps: tuple[str, str, str]  # infinitives
    why: str  # a clause
    example: str  # a clause
    figure: str  # a clause with numbers
    ask: str  # a question


TOPICS = (
    Topic(
        "repot a fern",
        ("loosen the root ball", "choose a pot with a hole", "water it in the shade"),
        "roots that have no room stop taking up water",
        "a neighbour's fern recovered on a north window sill",
        "a pot 3 cm wider and 200 ml of water are enough",
        "how old is the plant",
    ),
    Topic(
        "plan a week of dinners",
        ("write down what is already there", "repeat one dish", "shop once"),
        "decisions made hungry are expensive ones",
        "a pot of lentils becomes soup on Monday and salad on Tuesday",
        "5 dishes and 40 minutes of planning cover 7 evenings",
        "how many people eat",
    ),
    Topic(
        "fix a squeaky door",
        ("lift the pin out of the hinge", "rub it with wax", "put it back and swing the door"),
        "dry metal on metal makes the noise",
        "the stump of a candle kept one kitchen door quiet for years",
        "1 gram of wax lasts about 2 years",
        "is the hinge rusty",
    ),
    Topic(
        "learn to swim as an adult",
        ("practise breathing out under water", "float on the back", "add the kick last"),
        "panic comes from holding the breath",
        "a friend learnt it in a shallow lake one summer",
        "12 lessons of 45 minutes suffice for most people",
        "does deep water feel safe",
    ),
    Topic(
        "write a letter of complaint",
        ("say what happened", "attach the receipt", "name the remedy"),
        "a clear wish is easier to grant than an angry one",
        "a cousin got her train fare back with six plain lines",
        "keep it under 150 words and allow 14 days",
        "was there a call already",
    ),
    Topic(
        "bake bread without a machine",
        ("mix flour, water, salt and yeast", "let it rest overnight", "bake it in a hot pot"),
        "time does the work that kneading would do",
        "the loaf in a cast-iron pot comes out with a crust that cracks",
        "500 g of flour, 350 ml of water and 230 degrees",
        "does the oven have a fan",
    ),
    Topic(
        "sleep better in summer",
        ("air the room at dawn", "close the shutters by day", "take a lukewarm shower"),
        "the body must cool down before it falls asleep",
        "a damp towel in front of the window helped a whole family through July",
        "18 degrees is ideal and 24 still works",
        "does the room face south",
    ),
    Topic(
        "choose a used bicycle",
        ("look at the frame for cracks", "spin both wheels", "ride it uphill"),
        "a bent frame cannot be mended cheaply",
        "the green one at the market had new tyres and a cracked fork",
        "expect to pay 150 and set 60 aside for parts",
        "how far is the daily ride",
    ),
    Topic(
        "speak in front of a group",
        ("learn the first sentence by heart", "look at one friendly face", "pause after each point"),
        "nerves settle once the beginning is safe",
        "a choir master always spoke to the man in the third row",
        "3 points in 10 minutes are plenty",
        "how large is the group",
    ),
    Topic(
        "keep a houseplant alive while away",
        ("move it out of the sun", "water it well", "stand it on wet gravel"),
        "cool plants drink slowly",
        "a fig stood in the bathtub for two weeks and put out a leaf",
        "2 litres of gravel keep it moist for 10 days",
        "how long is the journey",
    ),
    Topic(
        "save money on heating",
        ("seal the gaps around the windows", "turn the rooms down at night", "bleed the radiators"),
        "warm air leaves by the smallest crack",
        "a rolled blanket at the door made a cold hall usable again",
        "1 degree less saves about 6 percent",
        "is the house insulated",
    ),
    Topic(
        "teach a dog to come back",
        ("start in a quiet room", "reward every return", "add distance slowly"),
        "the dog must find its owner more interesting than the rest",
        "a rescue from the village learnt it with bits of cheese",
        "5 minutes twice a day for 3 weeks",
        "how old is the dog",
    ),
    Topic(
        "clean a coffee machine",
        ("empty the tank", "run vinegar through it", "rinse it twice"),
        "scale keeps the water from getting hot",
        "the one in an office tasted new after a single round",
        "100 ml of vinegar on 900 ml of water every 8 weeks",
        "is the water hard",
    ),
    Topic(
        "start running after a break",
        ("walk first", "run slowly enough to talk", "rest every second day"),
        "tendons adapt more slowly than lungs",
        "a colleague began with laps around the pond and now runs home",
        "20 minutes 3 times a week is a good start",
        "have the knees hurt before",
    ),
    Topic(
        "sort old photographs",
        ("throw out the blurred ones", "group them by year", "label the people"),
        "names are forgotten sooner than faces",
        "one album held an uncle whom nobody could place",
        "200 pictures take about 2 hours",
        "are they on paper",
    ),
    Topic(
        "grow tomatoes on a balcony",
        ("choose a small variety", "give it a deep pot", "pinch out the side shoots"),
        "a tomato feeds from as much soil as it gets",
        "the cherry kind on the third floor cropped until October",
        "10 litres of soil and 6 hours of sun",
        "which way does the balcony face",
    ),
    Topic(
        "prepare for a job interview",
        ("read what they make", "practise two stories aloud", "lay out the clothes"),
        "what was said aloud once comes easily again",
        "a nurse told of the night the power failed",
        "2 stories of 90 seconds and 3 questions to ask",
        "is it by telephone",
    ),
    Topic(
        "remove a wine stain",
        ("blot it at once", "pour sparkling water on it", "wash it cold"),
        "heat fixes the colour in the cloth",
        "a white table cloth survived a whole glass",
        "within 10 minutes and at 30 degrees at most",
        "is the fabric wool",
    ),
    Topic(
        "read more books",
        ("keep one by the bed", "leave the telephone in the kitchen", "stop boring books"),
        "a habit needs a place more than it needs will",
        "a shelf in the hall got two boys reading before school",
        "15 pages a day make 18 books a year",
        "are novels welcome",
    ),
    Topic(
        "set up a small aquarium",
        ("wash the gravel", "let the water stand", "add a few fish only"),
        "bacteria must settle before animals do",
        "three snails kept the glass clear in one small tank",
        "60 litres and 4 weeks of patience",
        "is there a filter",
    ),
    Topic(
        "patch a bicycle tube",
        ("find the hole in a bowl of water", "roughen the rubber", "press the patch on"),
        "glue needs a rough and dry surface",
        "a patch from a camping trip outlived the tyre",
        "wait 5 minutes and press for 30 seconds",
        "is there a pump",
    ),
    Topic(
        "learn a language alone",
        ("listen every day", "speak aloud", "read familiar books"),
        "words stay when they are met in many places",
        "a sailor learnt Greek from cookery books",
        "20 minutes a day and 1,000 words carry a conversation",
        "which language is it",
    ),
    Topic(
        "hang a heavy mirror",
        ("find the studs", "drill two holes level", "use hooks made for the weight"),
        "plaster alone does not hold",
        "one hall mirror came down at night",
        "2 hooks of 15 kg each for a 20 kg mirror",
        "what is the wall made of",
    ),
    Topic(
        "make a room quieter",
        ("hang a thick curtain", "put felt under the chairs", "seal the door"),
        "hard surfaces throw the sound back",
        "a full bookcase on the party wall did it for one flat",
        "4 cm of felt take off about 5 decibels",
        "where does the noise come from",
    ),
)

# Questions about a task, in two sentences at most.
FORMS = (
    "How do I {task}?",
    "What is the best way to {task}?",
    "I have never done it before. How should I {task}?",
    "My partner and I disagree. What is the right way to {task}?",
    "I have one free afternoon. Can you tell me how to {task}?",
    "I tried last year and failed. How can I {task} this time?",
    "I am on a small budget. How would you {task}?",
    "My daughter wants to know how to {task}. What shall I tell her?",
    "Somebody gave me odd advice. How does one really {task}?",
    "I would like to {task}. Where do I begin?",
    "Is it hard to {task}? What do you advise?",
    "Please help me to {task}.",
)
