"""Which language and which script a text is in: from its letters, then from frequent words. Deterministic, no model, no download.

A script that one language (here) writes decides alone (Thai, Korean, Tamil ...). Languages that share one are told apart by letters that
the others lack and by function words. Good for a few sentences; a text without either is None, not a guess.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable

from jaxrl_llm.rewards.constraints.kinds import WrongKind

LANGUAGES = dict(
    en="English", de="German", fr="French", es="Spanish", it="Italian", pt="Portuguese", nl="Dutch", sv="Swedish", da="Danish", no="Norwegian",
    fi="Finnish", pl="Polish", cs="Czech", hu="Hungarian", ro="Romanian", tr="Turkish", id="Indonesian", vi="Vietnamese", sw="Swahili",
    ru="Russian",
    uk="Ukrainian", bg="Bulgarian", ar="Arabic", fa="Persian", ur="Urdu", he="Hebrew", hi="Hindi", mr="Marathi", ne="Nepali", bn="Bengali",
    pa="Punjabi", gu="Gujarati", ta="Tamil", te="Telugu", kn="Kannada", ml="Malayalam",
    th="Thai", el="Greek", ko="Korean", ja="Japanese", zh="Chinese",
)  # fmt: skip
_OTHER_NAMES = {"zh-cn": "zh", "zh-tw": "zh", "nb": "no", "iw": "he"}
# The first word of a character's Unicode name, for the scripts that are named; CJK ideographs are Han.
_SCRIPT_LIST = (
    "Latin Cyrillic Greek Arabic Hebrew Devanagari Bengali Gurmukhi Gujarati Tamil Telugu Kannada Malayalam Thai Hangul Hiragana Katakana Han"
)
SCRIPTS = tuple(_SCRIPT_LIST.split())
_NAMED = {name.upper(): name for name in SCRIPTS} | {"CJK": "Han"}
_ALONE = {"Greek": "el", "Hebrew": "he", "Bengali": "bn", "Gurmukhi": "pa", "Gujarati": "gu", "Tamil": "ta", "Telugu": "te", "Kannada": "kn"}
_ALONE |= {"Malayalam": "ml", "Thai": "th", "Hangul": "ko", "Hiragana": "ja", "Katakana": "ja", "Han": "zh"}
_FREQUENT = {
    "Latin": dict(
        en="the and of to is are was were that this these with for from have has not you it he they we his their be will would can which who what "
        "but at as on in an or all by",
        de="der die das und ist nicht ein eine einen mit von zu den dem des auf für sich im auch es ich sie wir war sind wird als wie oder aber",
        fr="le la les des et est une un du dans que qui pour pas sur avec au aux ce cette nous vous ils elle sont ont par plus être en se je",
        es="el la los las de y es una un que en por con para del se no su al como más pero sus son está lo este muy también hay",
        it="il lo la gli le di e è una un che in per con del della dei nel sono non si come più ma anche al alla questo ed ha essi",
        pt="o a os as de e é uma um que em por com para do da dos das não se no na ao como mais mas são está também seu sua uns",
        nl="de het een en is van in op te dat die niet met voor zijn aan er maar ook als bij naar om hij ze wij wordt worden deze heeft",
        sv="och att det är en ett som på för av med inte den till har jag vi var från men om han hon ska kan alla sig",
        da="og at det er en et som på for af med ikke den til har jeg vi var fra men om han hun skal kan alle sig blev efter",
        no="og at det er en et som på for av med ikke den til har jeg vi var fra men om han hun skal kan alle seg ble etter",
        fi="ja on ei että se oli ovat hän mutta kun joka mukaan myös kuin niin tai minä sinä he olen sen jos kaikki heidän",
        pl="i w nie na się jest z do że to jak ale po co tak za od przez być są dla ten który oraz",
        cs="a v je se na že to s z do jako ale si by jsem jsou které který pro tak po není byl jejich",
        hu="a az és hogy nem egy is van ez volt meg de csak mint ha vagy már el még akkor lesz minden nagyon",
        ro="și de în la cu nu este un o pe că se din care pentru mai sunt fi dar cea ale sau lor după",
        tr="ve bir bu da de için ile çok olarak daha olan gibi ne ama var değil ben sen o onun kadar sonra her",
        id="yang dan di ke dari untuk dengan pada ini itu tidak adalah akan dalam oleh juga saya mereka kami ada bisa sebagai orang",
        vi="và của là các có không được cho một những trong người với này để đã khi từ đến tôi ra mọi như bằng về phải",
        sw="na ya wa kwa ni katika la za kuwa cha hii watu vya kama lakini pia yake hiyo wote sana au alikuwa baada mtoto mama yao",
    ),
    "Cyrillic": dict(
        ru="и в не на что он с как это по но они из у за то все она так его был только для же от мы вы быть люди или должны",
        uk="і в не на що він з як це по але та до за у все вона так його був для від ми ви або бути вони її",
        bg="и в не на че той с как това по но те от за да са се е ще със към му си като което които или дух следва всички",
    ),
    "Devanagari": dict(
        hi="के का की में है और से को पर यह ने भी हैं था नहीं एक इस हो कि तो ही या थे थी लिए करना उन्हें सभी",
        mr="आहे आणि व या ते की हे तो आहेत नाही मध्ये एक होते होता ती त्या त्यांना असे मी करावे सर्व केले हा ही",
        ne="छ र को मा हो छन् गर्न पनि यो लाई भने थियो हुन् हरू तिनीहरूको गर्नु पर्छ एक गरेको सबै उनले भएको हुन्छ",
    ),
    "Arabic": dict(
        ar="في من على إلى أن هذا التي ما لا كان هذه عن مع الذي كل هو هي قد أو بعد بين جميع وقد",
        fa="و در به از که این را با است آن برای می های یک هم شد بود تا بر هر ما خود آزاد همه باید",
        ur="کے کی میں ہے اور سے کا کو پر نے کہ یہ ہیں بھی نہیں ایک تھا ہو اس وہ تمام ہوئے انہیں کرنا",
    ),
}
# Letters that only one of the languages sharing a script writes; each counts as much as a frequent word.
_LETTERS = {"ru": "ыэё", "uk": "іїєґ", "bg": "ъ", "fa": "پچژگ", "ur": "ٹڈڑےںھہ", "ar": "ةىإأ", "de": "ß"}
_LETTERS |= {"vi": "ơưđạảấầẩậắằẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵ"}
_LETTERS |= {"pl": "łąęśźż", "cs": "ěřů", "hu": "őű", "ro": "șță", "tr": "ğış", "pt": "ãõ", "es": "ñ¿¡", "da": "æ", "mr": "ळ"}
_URDU_ONLY = frozenset("ٹڈڑےںہھ")
_WORD = re.compile(r"[^\s\d.,;:!?()\[\]{}\"'«»“”‘’…/*_#<>|~`+=،؟؛۔।。！？-]+")
LOOK_AT = 5_000  # characters; a language shows in far fewer



def _signs(script: str) -> dict[str, list[str]]:
    """Word or letter -> the languages of a script that it speaks for."""
    found: dict[str, list[str]] = {}
    for code, frequent in _FREQUENT[script].items():
        for sign in [*dict.fromkeys(frequent.split()), *_LETTERS.get(code, "")]:
            found.setdefault(sign, []).append(code)
    return found


_SIGNS = {script: _signs(script) for script in _FREQUENT}
_MARKS = {script: frozenset("".join(_LETTERS.get(code, "") for code in _FREQUENT[script])) for script in _FREQUENT}

# One sentence a language for examples of constraints.
SAMPLES = {
    "en": "The old mill stands by the river and the children play there every day.",
    "de": "Die alte Mühle steht am Fluss und die Kinder spielen dort jeden Tag mit dem Hund.",
    "fr": "Le vieux moulin est près de la rivière et les enfants jouent dans le jardin avec le chien.",
    "es": "El viejo molino está cerca del río y los niños juegan con el perro en el jardín.",
    "it": "Il vecchio mulino è vicino al fiume e i bambini giocano con il cane nel giardino.",
    "ru": "Старая мельница стоит у реки, и дети играют там каждый день, потому что это весело.",
    "zh": "老磨坊在河边，孩子们每天都在那里玩。",
    "ja": "古い水車小屋は川のそばにあって、子どもたちは毎日そこで遊びます。",
    "ko": "오래된 방앗간은 강가에 있고 아이들은 매일 그곳에서 놀아요.",
    "ar": "الطاحونة القديمة على ضفة النهر والأطفال يلعبون هناك كل يوم في الحديقة مع الكلب.",
    "hi": "पुरानी चक्की नदी के पास है और बच्चे वहाँ हर दिन खेलते हैं।",
}


def language(value) -> str:
    """A kind of parameter: the code of a language that can be told here."""
    code = _OTHER_NAMES.get(value.lower(), value.lower()) if isinstance(value, str) else None
    if code not in LANGUAGES:
        raise WrongKind(f"the code of a language, one of {', '.join(sorted(LANGUAGES))}")
    return code


def scripts(text: str) -> Counter[str]:
    """How many letters of each script a text has; letters of other scripts count as "other"."""
    found: Counter[str] = Counter()
    for char, times in Counter(text).items():
        if char.isalpha() or unicodedata.category(char) in ("Mc", "Mn"):
            # Marks that several scripts share, and the fullwidth and halfwidth forms, name no script first.
            name = unicodedata.name(char, "").split(" ")
            if name[0] != "COMBINING":
                found[_NAMED.get(next((word for word in name if word in _NAMED), ""), "other")] += times
    return found


def detect(text: str) -> str | None:
    """The code of the language that a text is in, None where it has no letters or no language can be told."""
    text = text[:LOOK_AT]
    counts = scripts(text)
    if not counts:
        return None
    if counts["Hiragana"] + counts["Katakana"] > 0.1 * counts["Han"]:
        counts["Hiragana"] += counts["Katakana"] + counts["Han"]
    script = max(counts, key=lambda name: counts[name])
    if script in _ALONE:
        return _ALONE[script]
    return _by_words(text.lower(), script) if script in _SIGNS else None


def _by_words(text: str, script: str) -> str | None:
    """The language with most frequent words and letters of its own; the first of the table where two have as many."""
    found, scores = Counter(_WORD.findall(text)), dict.fromkeys(_FREQUENT[script], 0)
    for word, times in found.items():
        signs = {word, *(_MARKS[script] & set(word))}
        for sign in signs:
            for code in _SIGNS[script].get(sign, ()):
                scores[code] += times * (word == sign or word.count(sign))
    if "ur" in scores and scores["ur"] and _URDU_ONLY & set(text):  # Urdu writes the letters of Persian too
        scores["ur"] += scores["fa"]
        scores["fa"] = 0
    best = max(scores, key=lambda code: scores[code])
    return best if scores[best] > 0 else None


def other_sample(code: str, choose: Callable[[list[str]], str]) -> str:
    """A sentence in another language than `code`."""
    return SAMPLES[choose([other for other in SAMPLES if other != code])]
