"""The vocabulary of recall documents: 256 keys and 256 values, distinct sets of English words.

Keys are things, values are animals and given names. No word is the beginning of another one, so
that each is found whole by a tokenizer in which it stands as one symbol.
"""

from __future__ import annotations

_KEYS = """
almond amber antler anvil apricot apron armor attic avocado axle bakery balcony bamboo banjo
barley barrel basil basket beacon beetroot biscuit blanket blossom bonnet bottle boulder bramble
brandy bracelet breeze brick bronze broom burlap buckle butter bugle cabbage cabin cactus candle
canoe canvas caramel carpet carriage carrot cashew castle cauldron cedar cellar cello chalk
chandelier cherry chimney chisel chocolate cinnamon citrus clarinet clover cobalt coconut coffee
compass copper coral cotton cottage cradle crayon crimson crystal cucumber cumin curtain cushion
cymbal cypress dagger daisy denim diamond drawer dumpling easel ebony eggplant elbow emerald
eyelash eclair fabric feather fennel fiddle flannel flask flour flute fountain fudge furnace
galaxy garlic garnet geyser ginger glacier glove goblet granite grape gravel guitar hammer hammock
harbor hamper harpoon hatchet hazel helmet honey horizon indigo inkwell icicle ivory jasmine
jersey juniper kimono kettle kennel kitchen kite ladder ladle lantern laundry lavender leather
lemon lettuce lilac linen lumber magnolia mahogany mango mandolin maple marble marigold mattress
meadow melon mineral minaret mitten morsel mosaic mountain muffin mustard napkin necklace nectar
nickel nutmeg nylon oatmeal obelisk olive onion opal orchard orchid oregano oven paddle palace
pancake pantry paprika papaya parsley pastry peach peanut pearl pebble pedal pendant pepper petal
piano pigment pillow pistachio pitcher plaster platinum pocket poppy porridge pottery prairie
prism pumpkin puzzle quarry quartz quilt raisin ribbon rosemary rudder saddle saffron salad sandal
sapphire satchel saucer scarf scarlet shovel silver spinach teapot thimble timber tulip turnip
umbrella vanilla velvet walnut willow wicker windmill wreath yarn yogurt zeppelin zinc zipper
sundial sycamore tapestry trellis trombone
"""

_VALUES = """
aardvark albatross alligator alpaca anchovy antelope armadillo baboon badger barnacle beaver
beetle bison bobcat buffalo bulldog bumblebee bunny bullfrog cassowary canary capybara caribou
catfish centipede chameleon cheetah chicken chimpanzee chinchilla chipmunk cicada cobra cockatoo
condor cougar coyote crane cricket crocodile curlew dingo dolphin donkey dragonfly eagle earthworm
egret elephant falcon ferret finch firefly flamingo flounder foxhound gazelle gecko gerbil gibbon
giraffe goldfish goose gopher gorilla grasshopper grouse guppy haddock halibut hamster hedgehog
heron herring hippo hornet hyena ibex iguana impala jackal jaguar jellyfish kangaroo kestrel
kingfisher kiwi koala ladybug lemming lemur leopard lizard lapwing lobster locust lynx macaw
mackerel magpie mallard mammoth manatee marmot meerkat mongoose monkey moose mosquito mule muskrat
narwhal nuthatch nightingale ocelot octopus opossum orangutan ostrich otter oyster pangolin
panther parrot peacock pelican penguin pheasant pigeon piranha platypus porcupine possum puffin
puma porpoise rabbit raccoon raven reindeer rhino roadrunner rooster salamander salmon sardine
scorpion seahorse seagull shark sheep shrimp skunk sloth snail sparrow spider squid squirrel
starling stingray stork swallow swan tadpole tapir termite tiger tortoise toucan trout turkey
turtle vulture wallaby walrus warbler warthog weasel whale wolverine wombat woodpecker yak zebra
Abigail Adrian Alfred Beatrice Benjamin Brenda Caroline Cecilia Clarence Daphne Dominic Dorothy
Edgar Eleanor Felicity Florence Gabriel Genevieve Gordon Harriet Hector Isabel Jasper Josephine
Judith Katherine Leonard Lillian Louise Lucinda Marcus Marjorie Matilda Maurice Miriam Nathan
Nicholas Octavia Oliver Ophelia Patrick Penelope Phoebe Quentin Raphael Rebecca Rosalind Sabrina
Sebastian Sylvia Theodore Ursula Valerie Veronica Vincent Walter Winifred Yolanda Zachary Agatha
Barnaby Cordelia Delilah Ernest Francesca Gideon Humphrey Imogen Henrietta Ingrid Jeremiah
"""

NUM_WORDS = 256

RECALL_KEYS: tuple[str, ...] = tuple(_KEYS.split())[:NUM_WORDS]
RECALL_VALUES: tuple[str, ...] = tuple(_VALUES.split())[:NUM_WORDS]
