"""Sentences of the sample in SYNTH's schema: for each kind of exercise and language, questions and one answer.

Place in the path: **synth_templates** -> synth_sample -> assets/synth_sample.jsonl. Pure data.

Invariants: every slot in braces is filled by `synth_sample` for that kind; the languages are a part of SYNTH's own.

Example:
    >>> TEMPLATES["addition"]["fr"].answer.format(result=12)
    '12'
"""

from __future__ import annotations

from typing import NamedTuple

LANGUAGES = ("en", "fr", "de", "es", "it", "nl")
WEEKDAYS = {
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "fr": ("lundi", "mardi", "mercredi", "jeudi", "vendredi", "samedi", "dimanche"),
    "de": ("Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"),
    "es": ("lunes", "martes", "miércoles", "jueves", "viernes", "sábado", "domingo"),
    "it": ("lunedì", "martedì", "mercoledì", "giovedì", "venerdì", "sabato", "domenica"),
    "nl": ("maandag", "dinsdag", "woensdag", "donderdag", "vrijdag", "zaterdag", "zondag"),
}
YES_NO = {
    "en": ("Yes", "No"),
    "fr": ("Oui", "Non"),
    "de": ("Ja", "Nein"),
    "es": ("Sí", "No"),
    "it": ("Sì", "No"),
    "nl": ("Ja", "Nee"),
}


class Template(NamedTuple):
    """Questions to choose from, and the sentence of the answer."""

    questions: tuple[str, ...]
    answer: str


TEMPLATES: dict[str, dict[str, Template]] = {
    "addition": {
        "en": Template(("What is {a} + {b}?", "Add {a} and {b}.", "Compute the sum of {a} and {b}."), "{result}"),
        "fr": Template(("Combien font {a} + {b} ?", "Calcule la somme de {a} et {b}."), "{result}"),
        "de": Template(("Was ergibt {a} + {b}?", "Berechne die Summe von {a} und {b}."), "{result}"),
        "es": Template(("¿Cuánto es {a} + {b}?", "Calcula la suma de {a} y {b}."), "{result}"),
        "it": Template(("Quanto fa {a} + {b}?", "Calcola la somma di {a} e {b}."), "{result}"),
        "nl": Template(("Hoeveel is {a} + {b}?", "Bereken de som van {a} en {b}."), "{result}"),
    },
    "subtraction": {
        "en": Template(
            ("What is {a} - {b}?", "Subtract {b} from {a}.", "By how much is {a} larger than {b}?"), "{result}"
        ),
        "fr": Template(("Combien font {a} - {b} ?", "Soustrais {b} de {a}."), "{result}"),
        "de": Template(("Was ergibt {a} - {b}?", "Ziehe {b} von {a} ab."), "{result}"),
        "es": Template(("¿Cuánto es {a} - {b}?", "Resta {b} de {a}."), "{result}"),
        "it": Template(("Quanto fa {a} - {b}?", "Sottrai {b} da {a}."), "{result}"),
        "nl": Template(("Hoeveel is {a} - {b}?", "Trek {b} af van {a}."), "{result}"),
    },
    "multiplication": {
        "en": Template(
            ("What is {a} × {b}?", "Multiply {a} by {b}.", "A box holds {a} nails. How many are in {b} boxes?"),
            "{result}",
        ),
        "fr": Template(("Combien font {a} × {b} ?", "Multiplie {a} par {b}."), "{result}"),
        "de": Template(("Was ergibt {a} × {b}?", "Multipliziere {a} mit {b}."), "{result}"),
        "es": Template(("¿Cuánto es {a} × {b}?", "Multiplica {a} por {b}."), "{result}"),
        "it": Template(("Quanto fa {a} × {b}?", "Moltiplica {a} per {b}."), "{result}"),
        "nl": Template(("Hoeveel is {a} × {b}?", "Vermenigvuldig {a} met {b}."), "{result}"),
    },
    "division": {
        "en": Template(
            ("Divide {a} by {b}, with remainder.", "How often does {b} go into {a}, and what is left?"),
            "{result} remainder {rest}",
        ),
        "fr": Template(("Divise {a} par {b}, avec reste.",), "{result} reste {rest}"),
        "de": Template(("Teile {a} durch {b} mit Rest.",), "{result} Rest {rest}"),
        "es": Template(("Divide {a} entre {b}, con resto.",), "{result} resto {rest}"),
        "it": Template(("Dividi {a} per {b}, con resto.",), "{result} resto {rest}"),
        "nl": Template(("Deel {a} door {b}, met rest.",), "{result} rest {rest}"),
    },
    "copying": {
        "en": Template(
            ("Repeat exactly: {text}", "Copy this number: {text}", "Write {text} again, unchanged."), "{text}"
        ),
        "fr": Template(("Répète exactement : {text}", "Recopie ce nombre : {text}"), "{text}"),
        "de": Template(("Wiederhole genau: {text}", "Schreibe diese Zahl ab: {text}"), "{text}"),
        "es": Template(("Repite exactamente: {text}", "Copia este número: {text}"), "{text}"),
        "it": Template(("Ripeti esattamente: {text}", "Copia questo numero: {text}"), "{text}"),
        "nl": Template(("Herhaal precies: {text}", "Schrijf dit getal over: {text}"), "{text}"),
    },
    "date": {
        "en": Template(
            ("Which date is {days} days after {start}?", "It is {start}. What is the date in {days} days?"), "{end}"
        ),
        "fr": Template(("Quelle est la date {days} jours après le {start} ?",), "Le {end}"),
        "de": Template(("Welches Datum ist {days} Tage nach dem {start}?",), "Der {end}"),
        "es": Template(("¿Qué fecha es {days} días después del {start}?",), "El {end}"),
        "it": Template(("Che data è {days} giorni dopo il {start}?",), "Il {end}"),
        "nl": Template(("Welke datum is {days} dagen na {start}?",), "{end}"),
    },
    "weekday": {
        "en": Template(
            (
                "Today is {day}. Which day is it in {days} days?",
                "If it is {day} now, what day comes {days} days later?",
            ),
            "{result}",
        ),
        "fr": Template(("Aujourd'hui, c'est {day}. Quel jour serons-nous dans {days} jours ?",), "{result}"),
        "de": Template(("Heute ist {day}. Welcher Tag ist in {days} Tagen?",), "{result}"),
        "es": Template(("Hoy es {day}. ¿Qué día será dentro de {days} días?",), "{result}"),
        "it": Template(("Oggi è {day}. Che giorno sarà tra {days} giorni?",), "{result}"),
        "nl": Template(("Vandaag is het {day}. Welke dag is het over {days} dagen?",), "{result}"),
    },
    "units": {
        "en": Template(
            ("Convert {a} {unit} to {target}.", "How many {target} are {a} {unit}?"), "{a} {unit} = {result} {target}"
        ),
        "fr": Template(("Convertis {a} {unit} en {target}.",), "{a} {unit} = {result} {target}"),
        "de": Template(("Rechne {a} {unit} in {target} um.",), "{a} {unit} = {result} {target}"),
        "es": Template(("Convierte {a} {unit} a {target}.",), "{a} {unit} = {result} {target}"),
        "it": Template(("Converti {a} {unit} in {target}.",), "{a} {unit} = {result} {target}"),
        "nl": Template(("Reken {a} {unit} om naar {target}.",), "{a} {unit} = {result} {target}"),
    },
    "divisibility": {
        "en": Template(("Is {a} divisible by {b}?", "Does {b} divide {a} without a remainder?"), "{verdict}"),
        "fr": Template(("Est-ce que {a} est divisible par {b} ?",), "{verdict}"),
        "de": Template(("Ist {a} durch {b} teilbar?",), "{verdict}"),
        "es": Template(("¿Es {a} divisible entre {b}?",), "{verdict}"),
        "it": Template(("{a} è divisibile per {b}?",), "{verdict}"),
        "nl": Template(("Is {a} deelbaar door {b}?",), "{verdict}"),
    },
    "ordering": {
        "en": Template(
            (
                "{p} is older than {q}. {q} is older than {r}. Who is the oldest?",
                "{q} is older than {r}, and {p} is older than {q}. Who is the oldest?",
            ),
            "{p}",
        ),
        "fr": Template(("{q} a plus d'années que {r}, et {p} en a plus que {q}. Qui a le plus d'années ?",), "{p}"),
        "de": Template(("{q} ist älter als {r}, und {p} ist älter als {q}. Wer hat das höchste Alter?",), "{p}"),
        "es": Template(("{q} tiene más años que {r}, y {p} tiene más años que {q}. ¿Quién tiene más años?",), "{p}"),
        "it": Template(("{q} ha più anni di {r}, e {p} ha più anni di {q}. Chi ha più anni?",), "{p}"),
        "nl": Template(("{q} is ouder dan {r}, en {p} is ouder dan {q}. Wie is het oudst?",), "{p}"),
    },
    "sorting": {
        "en": Template(
            ("Sort from small to large: {listed}", "Put these numbers in ascending order: {listed}"), "{sorted}"
        ),
        "fr": Template(("Trie du plus petit au plus grand : {listed}",), "{sorted}"),
        "de": Template(("Sortiere von klein nach groß: {listed}",), "{sorted}"),
        "es": Template(("Ordena de menor a mayor: {listed}",), "{sorted}"),
        "it": Template(("Ordina dal più piccolo al più grande: {listed}",), "{sorted}"),
        "nl": Template(("Sorteer van klein naar groot: {listed}",), "{sorted}"),
    },
    "sequence": {
        "en": Template(("Which number comes next: {listed}, …?", "Continue by one number: {listed}, …"), "{result}"),
        "fr": Template(("Quel nombre vient ensuite : {listed}, … ?",), "{result}"),
        "de": Template(("Welche Zahl kommt als nächste: {listed}, …?",), "{result}"),
        "es": Template(("¿Qué número sigue: {listed}, …?",), "{result}"),
        "it": Template(("Quale numero viene dopo: {listed}, …?",), "{result}"),
        "nl": Template(("Welk getal komt hierna: {listed}, …?",), "{result}"),
    },
}
