"""Responses to IFEval's prompts for the comparison with lm-eval: ordinary, obedient and hostile ones. Only the standard library.

make_golden_ifeval.py (in lm-eval's environment) and test_ifeval_parity.py (in ours) read the same list, made of the prompt's own
parameters, of real answers in shared assets, and of the texts below.
"""

# ruff: noqa: E501 - wide scripts count double

import hashlib
import json
import random

SENTENCE = "The river ran past the old mill, and the children watched it for an hour."
WORDS = ["river", "mill", "child", "stone", "lamp", "bread", "winter", "garden", "letter", "horse", "window", "cloud", "road", "basket", "music", "paper"]
# Article 1 of the Universal Declaration of Human Rights (public domain), for the languages that IFEval asks for, and some that it does not.
ARTICLE_1 = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and should act "
    "towards one another in a spirit of brotherhood.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und sollen einander "
    "im Geist der Brüderlichkeit begegnen.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di ragione e di coscienza e devono agire "
    "gli uni verso gli altri in spirito di fratellanza.",
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de razão e de consciência, devem agir uns para "
    "com os outros em espírito de fraternidade.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de conscience et doivent "
    "agir les uns envers les autres dans un esprit de fraternité.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y conciencia, deben "
    "comportarse fraternalmente los unos con los otros.",
    "fi": "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan. Heille on annettu järki ja omatunto, ja heidän on "
    "toimittava toisiaan kohtaan veljeyden hengessä.",
    "sw": "Watu wote wamezaliwa huru, hadhi na haki zao ni sawa. Wote wamejaliwa akili na dhamiri, hivyo yapasa watendeane kindugu.",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền. Mọi con người đều được tạo hóa ban cho lý trí và lương "
    "tâm và cần phải đối xử với nhau trong tình bằng hữu.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и должны поступать в "
    "отношении друг друга в духе братства.",
    "bg": "Всички хора се раждат свободни и равни по достойнство и права. Те са надарени с разум и съвест и следва да се отнасят помежду си "
    "в дух на братство.",
    "uk": "Всі люди народжуються вільними і рівними у своїй гідності та правах. Вони наділені розумом і совістю і повинні діяти у відношенні "
    "один до одного в дусі братерства.",
    "ar": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا وعليهم أن يعامل بعضهم بعضا بروح الإخاء.",
    "fa": "تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند. همه دارای عقل و وجدان هستند و باید نسبت به یکدیگر با روح "
    "برادری رفتار کنند.",
    "ur": "تمام انسان آزاد اور حقوق و عزت کے اعتبار سے برابر پیدا ہوئے ہیں۔ انہیں ضمیر اور عقل ودیعت ہوئی ہے۔ اس لیے انہیں ایک دوسرے کے ساتھ بھائی "
    "چارے کا سلوک کرنا چاہیے۔",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। उन्हें बुद्धि और अन्तरात्मा की देन प्राप्त है और परस्पर उन्हें "
    "भाईचारे के भाव से बर्ताव करना चाहिए।",
    "mr": "सर्व मानवी व्यक्ती जन्मतःच स्वतंत्र आहेत व त्यांना समान प्रतिष्ठा व समान अधिकार आहेत. त्यांना विचारशक्ती व सदसद्विवेकबुद्धी लाभलेली आहे व त्यांनी "
    "एकमेकांशी बंधुत्वाच्या भावनेने आचरण करावे.",
    "ne": "सबै व्यक्तिहरू जन्मजात स्वतन्त्र हुन् र तिनीहरूको समान अधिकार र महत्व छ। निजहरूमा विचार शक्ति र सद्विचार भएकोले निजहरूले आपसमा भातृत्वको "
    "भावनाबाट व्यवहार गर्नु पर्छ।",
    "bn": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে। তাঁদের বিবেক এবং বুদ্ধি আছে; সুতরাং সকলেরই একে অপরের প্রতি ভ্রাতৃত্বসুলভ "
    "মনোভাব নিয়ে আচরণ করা উচিত।",
    "gu": "પ્રતિષ્ઠા અને અધિકારોની દૃષ્ટિએ સર્વ માનવો જન્મથી સ્વતંત્ર અને સમાન હોય છે. તેમનામાં વિચારશક્તિ અને અંતઃકરણ હોય છે અને તેમણે પરસ્પર બંધુત્વની "
    "ભાવનાથી વર્તવું જોઇએ.",
    "pa": "ਸਾਰਾ ਮਨੁੱਖੀ ਪਰਿਵਾਰ ਆਪਣੀ ਮਹਿਮਾ, ਸ਼ਾਨ ਅਤੇ ਹੱਕਾਂ ਦੇ ਪੱਖੋਂ ਜਨਮ ਤੋਂ ਹੀ ਆਜ਼ਾਦ ਹੈ ਅਤੇ ਸੁਤੇ ਸਿੱਧ ਸਾਰੇ ਲੋਕ ਬਰਾਬਰ ਹਨ।",
    "ta": "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்; அவர்கள் மதிப்பிலும், உரிமைகளிலும் சமமானவர்கள், அவர்கள் நியாயத்தையும் "
    "மனச்சாட்சியையும் இயற்பண்பாகப் பெற்றவர்கள்.",
    "te": "ప్రతిపత్తిస్వత్వముల విషయమున మానవులెల్లరును జన్మతః స్వతంత్రులును సమానులును నగుదురు. వారు వివేచన అంతఃకరణ సంపన్నులగుటచే పరస్పరము "
    "భ్రాతృభావముతో వర్తింపవలయును.",
    "kn": "ಎಲ್ಲಾ ಮಾನವರೂ ಸ್ವತಂತ್ರರಾಗಿಯೇ ಹುಟ್ಟಿದ್ದಾರೆ. ಹಾಗೂ ಘನತೆ ಮತ್ತು ಹಕ್ಕುಗಳಲ್ಲಿ ಸಮಾನರಾಗಿದ್ದಾರೆ. ವಿವೇಕ ಮತ್ತು ಅಂತಃಕರಣಗಳನ್ನು ಪಡೆದವರಾದ್ದರಿಂದ ಅವರು "
    "ಪರಸ್ಪರ ಸಹೋದರ ಭಾವದಿಂದ ವರ್ತಿಸಬೇಕು.",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม และควรปฏิบัติต่อกันด้วยเจตนารมณ์แห่งภราดรภาพ",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 부여받았으며 서로 형제애의 정신으로 행동하여야 한다.",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
}
HOSTILE = (
    "", " \n\t ", "." * 300, "?!" * 100, "[" * 60 + "]" * 60, "[a\nb] [c] []", "*" * 120, "***\n***\n***", "a *** b\n***\nc ***",
    "******", "a******b", "a\n******\n \n******\nb", "* \n* b\n** c\n  * d\n- e\n-f\n\t- g\n*\n\n- ", "*a* **b** *c\nd* ** ** ***e***",
    "<<a>> <<\n>> <<<b>>>", "<<>>", "<< >>", '"quoted"', '"', ' "a" "b" ', '```json\n{"a": [1, 2,]}\n```', '```JSON\n{"a": NaN}```', '{"a": 1}```',
    "``````json[]", "9" * 5000, "My answer is yes", "so. my answer is no. My answer is no.", "P.S. a\np.s. b\nP. P. S c", "p.p.s", "PS. none", "p.\ns. x",
    "Section 1 a Section2 b SECTION 3\nsection 4\nPARAGRAPH 5 Day 6 Section\n7", "one\r\n\r\ntwo\rthree\u2028four\x0bfive\n\n\n\nsix",
    "'\"word's\" first\n\n\"Second, third\n\n''fourth\n\n\n\nfifth", "ẞß İi ŉ ǆ ﬁ ſ K Å Σς", "A\u0301 e\u0301 \u200b\u200d \u202eabc\u202c \ufeff", "\x00\x01\x7f",
    "I'M HERE. IT'S NASA'S U.S. OFFICE (HQ), AT&T R&D; CANNOT GO... A/B C-3PO 2X \"QUOTED\" 'SO' D'YOU X1.Y2 E.G. OK?! NO--YES $US %",
    "Dr. A. B. Smith (Ph.D.) met Mrs. Jones at 3 p.m. in the U.S. They paid $3.50, i.e. a lot. \"Why?\" he said. \"No!\" She left... Then it rained.",
    "1. First.\n2. Second.\n3) third\n\nNo. 5 is alive. See fig. 3. etc. and so on. e.g. this. J.K. Rowling wrote it. A. Then B. i think. yes",
    "wait... what?? no!! (really.) [yes.] “Well.” he said. It ended.) So it did.\" And.Then no space.Here",
    "COMMA, here", "Chinese，comma、only", "all small letters in this plain english line of text", "ALL CAPITAL LETTERS IN THIS PLAIN ENGLISH LINE OF TEXT",
)  # fmt: skip


def obedient(kwargs_by_name: dict[str, dict], rng: random.Random, shift: int = 0) -> str:
    """A response that tries to follow each instruction, up to `shift` away from each number asked for."""
    paragraphs, start, end = [SENTENCE], "", ""
    for name, kwargs in kwargs_by_name.items():
        number = next((value for value in kwargs.values() if isinstance(value, (int, float))), 1)
        wanted = max(int(number) + shift, 0)
        relation = next((value for key, value in kwargs.items() if key.endswith("relation")), "")
        wanted = max(wanted - 1, 0) if relation == "less than" else wanted
        kind = name.split(":")[1]
        if kind in ("existence", "forbidden_words"):
            words = kwargs.get("keywords") or kwargs["forbidden_words"]
            paragraphs.append("Here are " + " and ".join(words[: len(words) + (shift if kind == "existence" else -len(words))]) + ".")
        elif kind in ("frequency", "letter_frequency"):
            paragraphs.append(" ".join([str(kwargs.get("keyword") or kwargs["letter"])] * wanted))
        elif kind == "response_language":
            paragraphs = [ARTICLE_1.get(kwargs["language"], SENTENCE)] if not shift else [ARTICLE_1["fr"]]
        elif kind == "number_sentences":
            paragraphs = [" ".join(rng.choice(WORDS).capitalize() + rng.choice((".", "!", "?", " it is.")) for _ in range(wanted))]
        elif kind == "number_words":
            paragraphs = [" ".join(rng.choice(WORDS) for _ in range(wanted))]
        elif kind == "number_paragraphs":
            paragraphs = ["\n***\n".join([SENTENCE] * wanted)]
        elif kind == "nth_paragraph_first_word":
            paragraphs = [SENTENCE] * (int(kwargs["num_paragraphs"]) + shift)
            if kwargs["nth_paragraph"] <= len(paragraphs):
                paragraphs[int(kwargs["nth_paragraph"]) - 1] = kwargs["first_word"] + ", said the miller."
        elif kind == "number_placeholders":
            paragraphs.append(" ".join(["[name]"] * wanted))
        elif kind == "postscript":
            end = "\n\n" + kwargs["postscript_marker"] + " one more thing"
        elif kind == "number_bullet_lists":
            paragraphs.append("\n".join(rng.choice(("* ", "- ")) + rng.choice(WORDS) for _ in range(wanted)))
        elif kind == "constrained_response":
            paragraphs.append("My answer is " + ("yes." if not shift else "perhaps."))
        elif kind == "number_highlighted_sections":
            paragraphs.append(" ".join(f"*{rng.choice(WORDS)}*" for _ in range(wanted)))
        elif kind == "multiple_sections":
            paragraphs.append("\n".join(f"{kwargs['section_spliter']} {i + 1}\n{SENTENCE}" for i in range(wanted)))
        elif kind == "json_format":
            paragraphs = ['```json\n{"text": "' + SENTENCE + '"}\n```']
        elif kind == "title":
            start = "<<A title>>\n\n"
        elif kind == "two_responses":
            paragraphs = [SENTENCE + "\n******\n" + (SENTENCE if shift else "Another answer.")]
        elif kind == "repeat_prompt":
            start = kwargs["prompt_to_repeat"] + "\n"
        elif kind == "end_checker":
            end = "\n" + kwargs["end_phrase"]
        elif kind == "capital_word_frequency":
            paragraphs.append(" ".join(rng.choice(WORDS).upper() for _ in range(wanted)))
        elif kind == "no_comma":
            paragraphs = [paragraph.replace(",", "") for paragraph in paragraphs]
    text = start + "\n\n".join(paragraphs) + end
    kinds = {name.split(":")[1] for name in kwargs_by_name}
    text = f'"{text}"' if "quotation" in kinds else text
    text = text.lower() if "english_lowercase" in kinds else text
    return text.upper() if "english_capital" in kinds else text


def real_answers(assets) -> list[str]:
    """Answers of real models to real prompts (shared assets, instruction_pairs), in the file's order."""
    found = []
    for name in ("ifbench_pairs.json", "total_dataset.chat_normal_converted.json"):
        for pair in json.loads((assets / "data/instruction_pairs" / name).read_text(encoding="utf-8")):
            found += [pair["text_chosen"][-1]["content"], pair["text_rejected"][-1]["content"]]
    return found


def responses(index: int, row: dict, answers: list[str]) -> list[str]:
    """The responses to prompt number `index`: 16 of its own, and each hostile text in turn; the same list on every machine."""
    rng = random.Random(index)
    kwargs = dict(zip(row["instruction_id_list"], row["kwargs"], strict=True))
    good, over, under = obedient(kwargs, rng), obedient(kwargs, rng, 1), obedient(kwargs, rng, -1)
    languages = list(ARTICLE_1.values())
    own = [row["prompt"], good, over, under, f"Sure! Here it is:\n{good}", f"{good}\nI hope this helps.", f"Of course:\n{good}\nAnything else?"]
    own += [good.replace(" ", " *", 1) + "*", good.upper(), good.lower(), good.replace("\n", "\r\n"), good.replace("\n\n", "\n\n\n\n")]
    own += [answers[(3 * index + k) % len(answers)] for k in range(3)] + [languages[index % len(languages)]]
    return own + [HOSTILE[(7 * index + k) % len(HOSTILE)] for k in range(7)]


def digest(texts) -> str:
    """One short hash of all texts, so that verdicts of other texts are not taken for these."""
    found = hashlib.sha256()
    for text in texts:
        found.update(text.encode("utf-8", "surrogatepass") + b"\x00\xff")
    return found.hexdigest()[:16]
