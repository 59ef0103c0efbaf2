"""Texts of the demo data: titles, descriptions and categories in seven languages.

A text names the item's theme and subtopic, and its adjectives hint at two of the item's style dimensions. The rest of
an item's style shows only in what users do with it. Themes and subtopics are the same in every item type: users who
follow cold cases among podcasts like cold-case thrillers among audiobooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# theme -> age at which it is liked best, nouns for titles
_THEMES: dict[str, tuple[int, str]] = {
    "crime": (42, "Witness|Alibi|Verdict|Suspect|Evidence|Detective|Silence|Ransom|Confession|Shadow|Harbor|Motive"),
    "romance": (31, "Heart|Letter|Promise|Summer|Kiss|Wedding|Stranger|Secret|Longing|Rose|Goodbye|Hotel"),
    "history": (56, "Empire|Crown|Siege|Archive|Revolution|Dynasty|Treaty|Legion|Ruins|Chronicle|Throne|Voyage"),
    "science": (36, "Atom|Galaxy|Signal|Experiment|Horizon|Neuron|Gravity|Quantum|Orbit|Theory|Planet|Ocean"),
    "fantasy": (24, "Dragon|Sword|Realm|Oracle|Prophecy|Witch|Kingdom|Raven|Rune|Forest|Storm|Wolf"),
    "comedy": (27, "Joke|Circus|Neighbor|Disaster|Sofa|Banana|Accident|Clown|Party|Cousin|Nonsense|Pigeon"),
    "sport": (29, "Champion|Stadium|Marathon|Goal|Rival|Coach|Season|Underdog|Sprint|Trophy|Whistle|Penalty"),
    "business": (38, "Deal|Market|Startup|Founder|Strategy|Habit|Leader|Fortune|Margin|Focus|Office|Ladder"),
    "wellness": (44, "Breath|Calm|Morning|Balance|Garden|Sleep|Mind|Ritual|Stillness|Body|River|Light"),
    "family": (35, "Bear|Moon|Treehouse|Puppy|Pirate|Blanket|Rainbow|Grandma|Tiger|Button|Lantern|Balloon"),
    "society": (49, "Power|Border|Protest|Debate|Ballot|Street|Nation|Truth|Headline|Senate|Union|City"),
    "food": (40, "Kitchen|Salt|Journey|Table|Spice|Bread|Market Hall|Vineyard|Recipe|Island|Train|Coast"),
}
THEMES = tuple(_THEMES)
THEME_AGES = tuple(age for age, _ in _THEMES.values())
SUBTOPICS_PER_THEME = 8

_GENRES = {  # what a catalogue calls the theme in each type
    "podcast": "True Crime|Relationships|History|Science & Technology|Fantasy & Fiction|Comedy|Sports|Business|"
    "Health & Wellness|Kids & Family|News & Society|Food & Travel",
    "audiobook": "Crime & Thriller|Romance|Historical Fiction|Popular Science|Fantasy|Humor|Sports Biographies|"
    "Business & Careers|Self-Help|Children's Books|Politics & Society|Cookery & Travel Writing",
    "music": "Dark Jazz & Noir|R&B and Soul|Classical|Ambient Electronic|Metal & Epic|Indie Pop|Hip-Hop|Focus & Lo-Fi|"
    "New Age|Children's Music|Punk & Protest|Latin & World",
}
_SUBTOPICS = {  # eight a theme, in the order of THEMES
    "podcast": (
        "cold cases|serial killers|courtroom trials|heists|cults|missing persons|organized crime|forensics",
        "dating stories|marriage advice|long-distance love|breakups|love letters|attachment|weddings|queer love",
        "ancient Rome|the Second World War|medieval life|royal courts|the Cold War|seafaring|revolutions|lost cities",
        "astronomy|neuroscience|artificial intelligence|climate|quantum physics|evolution|oceans|spaceflight",
        "epic quests|dragons and magic|urban fantasy|mythology|vampires|tabletop adventures|fairy tales|dystopias",
        "stand-up|improv|satire|awkward stories|sketch comedy|pop culture jokes|office humor|absurd trivia",
        "football|basketball|running|cycling|boxing|tennis|motor racing|climbing",
        "startups|investing|leadership|marketing|productivity|real estate|economics|negotiation",
        "meditation|sleep|yoga|nutrition|anxiety|fitness|grief|mindful parenting",
        "bedtime stories|animal tales|school life|science for kids|pirate adventures|parenting|puzzles|sing-alongs",
        "elections|investigative journalism|migration|climate policy|city life|media|human rights|technology and law",
        "home cooking|street food|wine|baking|train journeys|island hopping|vegan kitchens|coffee",
    ),
    "audiobook": (
        "cold-case thrillers|serial-killer thrillers|legal thrillers|heist novels|cult thrillers|disappearances|"
        "mafia sagas|forensic mysteries",
        "romantic comedy|second-chance romance|long-distance romance|heartbreak novels|epistolary romance|"
        "slow-burn romance|wedding romance|queer romance",
        "novels of ancient Rome|wartime novels|medieval sagas|court intrigue|Cold War spies|naval adventures|"
        "novels of revolution|archaeological mysteries",
        "the universe|the brain|machines that think|a warming planet|the quantum world|our evolution|the deep sea|"
        "space exploration",
        "epic fantasy|dragon sagas|urban fantasy novels|myth retellings|vampire novels|quest gamebooks|"
        "fairy-tale retellings|dystopian fiction",
        "comic memoirs|farce|satirical novels|embarrassing memoirs|humorous essays|celebrity parody|"
        "workplace comedy|absurdist fiction",
        "football lives|basketball lives|runners' memoirs|cycling epics|boxing lives|tennis memoirs|racing drivers|"
        "mountaineering",
        "founding a company|personal investing|leading teams|brand building|time management|property|economic ideas|"
        "the art of negotiation",
        "mindfulness|better sleep|yoga philosophy|healthy eating|overcoming anxiety|strength and movement|"
        "living with loss|calm parenting",
        "picture-book bedtime|talking animals|classroom adventures|discovery for children|treasure hunts|"
        "raising children|riddle books|nursery rhymes",
        "democracy|reporters' memoirs|migrants' stories|climate justice|urban life|the press|civil rights|tech power",
        "home recipes|street-food travels|the wine country|bakers' memoirs|rail travels|island life|plant-based food|"
        "coffee routes",
    ),
    "music": (
        "midnight noir jazz|dark ambient|smoky courtroom blues|spy soundtracks|occult drone|lonesome trip-hop|"
        "mob-era swing|cold industrial",
        "neo-soul|slow jams|quiet-storm R&B|heartbreak ballads|acoustic love songs|vintage soul|wedding songs|"
        "queer pop ballads",
        "baroque suites|wartime songs|medieval chant|court dances|Soviet symphonies|sea shanties|romantic overtures|"
        "early opera",
        "space ambient|minimal techno|generative synths|field recordings|glitch|modular drift|aquatic chillout|"
        "cosmic synthwave",
        "power metal|dragon-themed folk metal|gothic rock|pagan folk|vampire darkwave|dungeon synth|Celtic harp|"
        "apocalyptic doom",
        "bedroom pop|quirky indie|novelty songs|awkward anti-folk|musical comedy|hyperpop|office disco|surreal pop",
        "stadium anthems|boom bap|running beats|trap|fight-night rap|jazz rap|driving drill|old-school breaks",
        "lo-fi study beats|deep-work piano|motivation house|upbeat jingles|pomodoro loops|lounge|soft piano|chillhop",
        "meditation bowls|sleep drones|yoga mantras|healing flutes|calm strings|gentle workout|consolation hymns|"
        "soft nursery harps",
        "lullabies|animal songs|school songs|counting songs|pirate songs|family folk|clapping games|toy piano",
        "protest folk|hardcore punk|migrant ska|eco-punk|street rap|post-punk|freedom songs|digital hardcore",
        "salsa|cumbia|fado|bossa nova|train blues|island reggae|flamenco|Ethio-jazz",
    ),
}
# Finer than subtopics; only worlds with many items use more than the first.
ANGLES = (
    *(
        "",
        "Nordic",
        "Victorian",
        "Mediterranean",
        "Californian",
        "Alpine",
        "Tokyo",
        "Parisian",
        "coastal",
        "small-town",
    ),
    *("wartime", "modern", "rural", "Andean", "Baltic", "Saharan", "nineties", "midnight", "northern", "island"),
)
# Adjectives by two style dimensions: (negative, positive) of the first, then of the second.
_TONES = (
    "Gentle|Quiet|Tender|Slow|Warm|Silver|Patient|Hushed",
    "Wild|Relentless|Burning|Furious|Restless|Electric|Broken|Savage",
    "Playful|Crooked|Curious|Lucky|Golden|Tiny|Unlikely|Merry",
    "Solemn|Hidden|Forgotten|Deep|Final|Distant|Invisible|Grave",
)
_TONE_LINES = (
    "soft-spoken and unhurried",
    "fast, raw and full of energy",
    "light-hearted and full of surprises",
    "serious, dense and carefully researched",
)
_PLACES = (
    "Lisbon|Oslo|Dakar|Kyoto|Belfast|Havana|Prague|Naples|Boston|Lagos|Cairo|Vienna|Hobart|Quito|Riga|Seoul|Bergen|"
    "Marseille|Glasgow|Tangier|Odessa|Galway|Santa Fe|Jaipur|Porto|Leipzig|Nairobi|Valparaíso|Trieste|Halifax"
)
_SHOWS = "Files|Hour|Report|Dispatch|Diaries|Sessions|Project|Room|Club|Notebook|Desk|Tapes|Question|Exchange"


@dataclass(frozen=True)
class _Language:
    """Everything that a template of one language draws from; lists are written with bars between the words."""

    names: str
    surnames: str
    genres: str
    nouns: str
    titles: str
    lines: str  # one description per type: audiobook, music, podcast
    joiner: str = " "


_LANGUAGES: dict[str, _Language] = {
    "de": _Language(
        "Anna|Jonas|Lena|Felix|Greta|Moritz|Clara|Emil|Frieda|Anton|Ida|Paul",
        "Brandt|Keller|Vogel|Lorenz|Schuster|Winkler|Roth|Baumann|Seidel|Krüger|Hahn|Engel",
        "Krimi|Liebe|Geschichte|Wissen|Fantasy|Humor|Sport|Wirtschaft|Achtsamkeit|Kinder|Gesellschaft|Essen und Reisen",
        "Schatten|Brief|Winter|Fluss|Stille|Haus|Sommer|Grenze|Licht|Turm|Versprechen|Garten|Spur|Nacht|Stimme|Insel",
        "{genre}: {noun} und {noun2}|Das letzte Kapitel: {noun} ({genre})|{noun} in {place}|{noun} und {noun2}|"
        "{noun}: {genre} mit {name}|Mehr als {noun}",
        "Ein Hörbuch von {name} über {noun} und {noun2}. {genre}, gelesen in {place}.|"
        "{name} verbindet {noun} und {noun2}: {genre}, aufgenommen in {place}.|"
        "{name} spricht jede Woche über {genre}: {noun}, {noun2} und alles dazwischen.",
    ),
    "fr": _Language(
        "Camille|Louis|Manon|Hugo|Chloé|Jules|Élise|Antoine|Margaux|Théo|Inès|Luc",
        "Moreau|Lefèvre|Garnier|Rousseau|Blanchet|Mercier|Fontaine|Chevalier|Perrin|Masson|Duval|Renaud",
        "Enquête criminelle|Amour|Histoire|Sciences|Fantastique|Humour|Sport|Économie|Bien-être|Enfants|Société|"
        "Cuisine et voyages",
        "Ombre|Lettre|Hiver|Rivière|Silence|Maison|Été|Frontière|Lumière|Tour|Promesse|Jardin|Trace|Nuit|Voix|Île",
        "{genre} : {noun} et {noun2}|{noun} à {place}|L'affaire {noun} ({genre})|{noun}, {noun2}|{genre} avec {name}|"
        "Au bord de {noun}",
        "Un livre audio de {name} : {noun}, {noun2}. {genre}, enregistré à {place}.|"
        "{name} mêle {noun} et {noun2} : {genre}, enregistré à {place}.|"
        "Chaque semaine, {name} raconte {genre} : {noun}, {noun2} et le reste.",
    ),
    "es": _Language(
        "Lucía|Mateo|Valentina|Diego|Sofía|Javier|Carmen|Andrés|Elena|Tomás|Inés|Pablo",
        "García|Romero|Navarro|Ibáñez|Castillo|Herrera|Vega|Molina|Ortega|Delgado|Ríos|Peña",
        "Crimen real|Amor|Historia|Ciencia|Fantasía|Humor|Deportes|Negocios|Bienestar|Infantil|Sociedad|Cocina y viaje",
        "Sombra|Carta|Invierno|Río|Silencio|Casa|Verano|Frontera|Luz|Torre|Promesa|Jardín|Huella|Noche|Voz|Isla",
        "{genre}: {noun} y {noun2}|{noun} en {place}|El caso {noun} ({genre})|{noun} y {noun2}|{genre} con {name}|"
        "Más allá de {noun}",
        "Un audiolibro de {name} sobre {noun} y {noun2}. {genre}, grabado en {place}.|"
        "{name} une {noun} y {noun2}: {genre}, grabado en {place}.|"
        "Cada semana, {name} habla de {genre}: {noun}, {noun2} y mucho más.",
    ),
    "pt": _Language(
        "Beatriz|Rafael|Larissa|Caio|Helena|Thiago|Marina|Bruno|Júlia|Otávio|Luana|Davi",
        "Almeida|Barbosa|Cardoso|Ferreira|Lacerda|Moraes|Nogueira|Pacheco|Queiroz|Teixeira|Vasconcelos|Araújo",
        "Crime real|Amor|História|Ciência|Fantasia|Humor|Esportes|Negócios|Bem-estar|Infantil|Sociedade|"
        "Cozinha e viagens",
        "Sombra|Carta|Inverno|Rio|Silêncio|Casa|Verão|Fronteira|Luz|Torre|Promessa|Jardim|Rastro|Noite|Voz|Ilha",
        "{genre}: {noun} e {noun2}|{noun} em {place}|O caso {noun} ({genre})|{noun} e {noun2}|{genre} com {name}|"
        "Depois de {noun}",
        "Um audiolivro de {name} sobre {noun} e {noun2}. {genre}, gravado em {place}.|"
        "{name} mistura {noun} e {noun2}: {genre}, gravado em {place}.|"
        "Toda semana, {name} fala de {genre}: {noun}, {noun2} e muito mais.",
    ),
    "ja": _Language(
        "葵|蓮|結衣|悠真|美咲|陽翔|さくら|大輔|真央|健太|七海|翔",
        "佐藤|高橋|渡辺|小林|中村|山田|石川|前田|藤原|岡本|松井|清水",
        "犯罪実録|恋愛|歴史|科学|ファンタジー|お笑い|スポーツ|ビジネス|瞑想と健康|こども|社会|料理と旅",
        "影|手紙|冬|川|沈黙|家|夏|国境|光|塔|約束|庭|足跡|夜|声|島",
        "{genre}:{noun}と{noun2}|{place}の{noun}|{noun}事件簿({genre})|{noun}と{noun2}|{name}の{genre}|最後の{noun}",
        "{name}による{genre}のオーディオブック。{noun}と{noun2}の物語。|"
        "{name}の{genre}。{noun}と{noun2}をテーマにした一曲。|"
        "{name}が毎週{genre}を語る。{noun}、{noun2}、そしてその先へ。",
        "",
    ),
    "hi": _Language(
        "आरव|अनन्या|कबीर|दीया|रोहन|मीरा|विवान|सारा|अर्जुन|इशिता|देव|तारा",
        "शर्मा|वर्मा|गुप्ता|मेहता|कपूर|जोशी|नायर|राव|सिंह|मल्होत्रा|चौधरी|पटेल",
        "सच्चे अपराध|प्रेम|इतिहास|विज्ञान|कल्पना|हास्य|खेल|व्यापार|स्वास्थ्य और ध्यान|बच्चे|समाज|खाना और सफ़र",
        "परछाईं|चिट्ठी|सर्दी|नदी|ख़ामोशी|घर|गर्मी|सरहद|रोशनी|मीनार|वादा|बाग़|निशान|रात|आवाज़|द्वीप",
        "{genre}: {noun} और {noun2}|{noun} का राज़ ({genre})|{noun} और {noun2}|{name} के साथ {genre}|आख़िरी {noun}|"
        "{place} की {noun}",
        "{name} की ऑडियोबुक: {noun} और {noun2}. {genre}.|{name} का गीत: {noun} और {noun2}. {genre}.|"
        "हर हफ़्ते {name} के साथ {genre}: {noun}, {noun2} और बहुत कुछ.",
    ),
}
LANGUAGES = ("en", *_LANGUAGES)
_NAMES = (
    "Maya|Oliver|Priya|Samuel|Nora|Elijah|Grace|Theo|Amara|Henry|Ruth|Dominic|Ivy|Marcus|Zoe|Callum|Leila|Jasper|Tess|"
    "Desmond|Fiona|Wesley|Hazel|Rory"
)
_SURNAMES = (
    "Whitlock|Okafor|Barnes|Lindqvist|Caldwell|Mensah|Hartley|Sorensen|Pryce|Delacroix|Novak|Abbott|Kwan|Farrow|Iqbal|"
    "Langley|Moss|Quill|Reyes|Tennant|Underwood|Vance|Winslow|Yates"
)
_TITLES = {
    "audiobook": "The {noun} of {place}|{adj} {noun}|A {noun} in {place}|The {adj} {noun}|{noun} and {noun2}|"
    "The {noun} Who Stayed|After the {adj} {noun}|What the {noun} Knew|{adj} {noun}, {adj2} {noun2}",
    "music": "{adj} {noun}|{noun} in {place}|{adj} {noun} ({place} Session)|{noun} & {noun2}|My {adj} {noun}|"
    "{noun} Song|{adj2} {noun2} Blues|{adj} {adj2} {noun}",
    "podcast": "The {adj} {noun} {show}|{Sub} with {name}|{noun} & {noun2}: {Sub}|The {noun} {show}|{adj} {noun}: {Sub}"
    "|{name}'s {noun} {show}|{place} {noun} {show}",
}
_LINES = {
    "audiobook": "{name} tells a story of {sub} set in {place}. {Tone}, read by {reader}.|"
    "In {place}, a {noun_l} changes everything. {name}'s take on {sub} is {tone}.|"
    "A book about {sub}: {noun_l}, {noun2_l} and the people between them. Narrated by {reader}; {tone}.",
    "music": "{name} plays {sub}, recorded in {place}. {Tone}.|A piece of {sub} by {name}: {tone}.|"
    "{Sub} from {place}, performed by {name} and {reader}. {Tone}.",
    "podcast": "{name} and guests talk about {sub} every week. {Tone}.|"
    "A show on {sub}, hosted by {name} from {place}: {tone}.|"
    "Join {name} for stories of {sub}, from the {noun_l} to the {noun2_l}. {Tone}.",
}


def topic_words(item_type: str, topic: int) -> tuple[str, str]:
    """Genre and subtopic (with its angle) of topic number ``topic``; see :func:`split_topic`."""
    theme, sub, angle = split_topic(topic)
    subtopic = _SUBTOPICS[item_type][theme].split("|")[sub]
    return _GENRES[item_type].split("|")[theme], f"{ANGLES[angle]} {subtopic}".strip()


def split_topic(topic: int) -> tuple[int, int, int]:
    """(theme, subtopic, angle) of a topic number: themes turn fastest, so that a few topics spread over all themes."""
    theme, rest = topic % len(THEMES), topic // len(THEMES)
    return theme, rest % SUBTOPICS_PER_THEME, rest // SUBTOPICS_PER_THEME


def write_text(
    item_type: str, topic: int, tone: Sequence[float], language: str, rng: np.random.Generator
) -> tuple[str, str, list[str]]:
    """Title, description and categories of one item.

    Args:
        item_type: one of audiobook, music, podcast.
        topic: topic number.
        tone: two style values; their sign and size choose the adjectives.
        language: one of LANGUAGES. Categories are English in every language, as in a shared taxonomy.
    """
    genre, subtopic = topic_words(item_type, topic)
    categories = [genre, subtopic]
    if language != "en":
        return *_local_text(item_type, topic % len(THEMES), _LANGUAGES[language], rng), categories
    draws = rng.random(16)
    nouns = _THEMES[THEMES[topic % len(THEMES)]][1].split("|")
    group = _tone_group(tone, draws[0])
    adjectives = _TONES[group].split("|")
    noun, noun2 = _pick(nouns, draws[1]), _pick(nouns, draws[2])
    words = {
        "noun": noun,
        "noun2": noun2 if noun2 != noun else "Echo",
        "noun_l": noun.lower(),
        "noun2_l": noun2.lower() if noun2 != noun else "echo",
        "adj": _pick(adjectives, draws[3]),
        "adj2": _pick(_TONES[int(draws[4] * 4)].split("|"), draws[5]),
        "place": _pick(_PLACES.split("|"), draws[6]),
        "show": _pick(_SHOWS.split("|"), draws[7]),
        "name": f"{_pick(_NAMES.split('|'), draws[8])} {_pick(_SURNAMES.split('|'), draws[9])}",
        "reader": f"{_pick(_NAMES.split('|'), draws[10])} {_pick(_SURNAMES.split('|'), draws[11])}",
        "sub": subtopic,
        "Sub": subtopic[:1].upper() + subtopic[1:],
        "tone": _TONE_LINES[group],
        "Tone": _TONE_LINES[group].capitalize(),
    }
    title = _pick(_TITLES[item_type].split("|"), draws[12]).format(**words)
    return title, _pick(_LINES[item_type].split("|"), draws[13]).format(**words), categories


def distinct(titles: list[str]) -> list[str]:
    """The n-th item of one title becomes its volume n: "Quiet River", "Quiet River, Vol. 2"."""
    seen: dict[str, int] = {}
    out = []
    for title in titles:
        seen[title] = seen.get(title, 0) + 1
        out.append(title if seen[title] == 1 else f"{title}, Vol. {seen[title]}")
    return out


def _tone_group(tone: Sequence[float], draw: float) -> int:
    """The louder of the two style dimensions speaks, mostly; its sign picks the words."""
    dimension = int(abs(tone[1]) > abs(tone[0])) ^ int(draw < 0.15)
    return 2 * dimension + int(tone[dimension] > 0)


def _local_text(item_type: str, theme: int, words: _Language, rng: np.random.Generator) -> tuple[str, str]:
    draws = rng.random(8)
    nouns = words.nouns.split("|")
    first = int(draws[0] * len(nouns))
    name = _pick(words.names.split("|"), draws[2]), _pick(words.surnames.split("|"), draws[3])
    values = {
        "genre": words.genres.split("|")[theme],
        "noun": nouns[first],
        "noun2": nouns[(first + 1 + int(draws[1] * (len(nouns) - 1))) % len(nouns)],
        # family name first where no space joins the two
        "name": words.joiner.join(name if words.joiner else name[::-1]),
        "place": _pick(_PLACES.split("|"), draws[4]),
    }
    line = words.lines.split("|")[("audiobook", "music", "podcast").index(item_type)]
    return _pick(words.titles.split("|"), draws[5]).format(**values), line.format(**values)


def _pick(words: Sequence[str], draw: float) -> str:
    """The word at ``draw`` in [0, 1)."""
    return words[int(draw * len(words))]
