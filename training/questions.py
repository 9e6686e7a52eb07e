"""Questions that can be asked about an entry, in many phrasings, and the one right answer to each.

A phrasing holds {x} where the name goes. TRAINED phrasings are what the model learns from; HELD_OUT ones appear in the
evaluation alone. The FOLLOW_UP ones speak of "it" and need the conversation before them.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence

from training.facts import Entry

KINDS = ("purpose", "where", "arguments", "kind", "import", "base", "members")

TRAINED: dict[str, tuple[str, ...]] = {
    "purpose": (
        "What does {x} do?",
        "What is {x} for?",
        "What is {x}?",
        "What's {x}?",
        "What does {x} mean?",
        "What is {x} used for?",
        "What is the purpose of {x}?",
        "What is the use of {x}?",
        "What can I use {x} for?",
        "What can I do with {x}?",
        "What would I use {x} for?",
        "Why would I use {x}?",
        "When would I use {x}?",
        "Explain {x}.",
        "Explain {x} to me.",
        "Explain what {x} does.",
        "Describe {x}.",
        "Describe what {x} does.",
        "Tell me about {x}.",
        "Tell me what {x} does.",
        "Tell me something about {x}.",
        "Define {x}.",
        "I want to know what {x} does.",
        "I want to understand {x}.",
        "I don't understand {x}.",
        "I'd like to learn about {x}.",
        "Do you know what {x} does?",
        "Do you know {x}?",
        "Can you explain {x}?",
        "Can you tell me what {x} does?",
        "Could you describe {x}?",
        "How would you describe {x}?",
        "In one sentence, what does {x} do?",
        "In short, what is {x}?",
        "Give me the documentation of {x}.",
        "What does the documentation say about {x}?",
        "What do the docs say about {x}?",
        "Show me the docstring of {x}.",
        "Help me with {x}.",
        "help({x})",
        "{x}",
        "{x}?",
        "{x}: what does it do?",
        "{x} - what is it for?",
        "I saw {x} in some code. What does it do?",
        "My colleague uses {x}. What is that?",
        "This code calls {x}, what is it?",
        "What is meant by {x}?",
        "Remind me what {x} does.",
        "What exactly does {x} do?",
    ),
    "where": (
        "Which module has {x}?",
        "Which module is {x} in?",
        "What module is {x} in?",
        "In which module is {x}?",
        "In what module can I find {x}?",
        "Where is {x}?",
        "Where is {x} defined?",
        "Where can I find {x}?",
        "Where do I find {x}?",
        "Where does {x} come from?",
        "Where does {x} live?",
        "What module contains {x}?",
        "Which module contains {x}?",
        "Which module defines {x}?",
        "Which module provides {x}?",
        "What module does {x} belong to?",
        "Which module does {x} belong to?",
        "{x} belongs to which module?",
        "{x} is in which module?",
        "{x} is part of what module?",
        "Which part of the standard library has {x}?",
        "Tell me the module of {x}.",
        "Tell me which module has {x}.",
        "Tell me where {x} is.",
        "Name the module of {x}.",
        "I am looking for {x}. Which module is it in?",
        "I can't find {x}. Where is it?",
        "Do you know where {x} is?",
        "Do you know which module has {x}?",
        "Can you tell me which module {x} is in?",
        "What is the module of {x}?",
        "What's the module name for {x}?",
    ),
    "arguments": (
        "What are the arguments of {x}?",
        "What arguments does {x} take?",
        "What arguments does {x} have?",
        "Which arguments does {x} take?",
        "Which arguments does {x} accept?",
        "What are the parameters of {x}?",
        "What parameters does {x} take?",
        "Which parameters does {x} have?",
        "Which parameters does {x} accept?",
        "What is the signature of {x}?",
        "What's the signature of {x}?",
        "Signature of {x}?",
        "Arguments of {x}?",
        "{x} arguments",
        "{x} parameters?",
        "{x} signature",
        "Show me the signature of {x}.",
        "Show me the arguments of {x}.",
        "Give me the signature of {x}.",
        "Give me the parameters of {x}.",
        "List the arguments of {x}.",
        "List the parameters of {x}.",
        "Tell me the arguments of {x}.",
        "Tell me the signature of {x}.",
        "How do I call {x}?",
        "How is {x} called?",
        "How can I call {x}?",
        "What do I pass to {x}?",
        "What can I pass to {x}?",
        "What should I pass to {x}?",
        "What does {x} take?",
        "What does {x} accept?",
        "I want to call {x}. What arguments does it take?",
        "Can you show me the parameters of {x}?",
        "Do you know the arguments of {x}?",
        "Does {x} take any arguments?",
    ),
    "kind": (
        "What kind of thing is {x}?",
        "What kind of object is {x}?",
        "What sort of thing is {x}?",
        "What type of object is {x}?",
        "Is {x} a function or a class?",
        "Is {x} a class or a function?",
        "Is {x} a module or a class?",
        "Is {x} a method or a function?",
        "Is {x} a class?",
        "Is {x} a function?",
        "Is {x} an exception?",
        "Is {x} a module?",
        "{x}: function or class?",
        "Tell me what kind of thing {x} is.",
        "Tell me whether {x} is a class or a function.",
        "Do you know what kind of object {x} is?",
        "What is the kind of {x}?",
        "Would you call {x} a class or a function?",
    ),
    "import": (
        "How do I import {x}?",
        "How can I import {x}?",
        "How to import {x}?",
        "How does one import {x}?",
        "How is {x} imported?",
        "What is the import for {x}?",
        "What's the import line for {x}?",
        "What import do I need for {x}?",
        "Which import do I need for {x}?",
        "What do I have to import for {x}?",
        "What must I import to use {x}?",
        "Show me the import for {x}.",
        "Show me how to import {x}.",
        "Give me the import of {x}.",
        "Give me the import line for {x}.",
        "I need to import {x}.",
        "I want to import {x}. How?",
        "Import {x}",
        "Do I have to import {x}?",
        "Can you import {x} for me?",
        "Write the import statement for {x}.",
    ),
    "base": (
        "What is the base class of {x}?",
        "What's the base class of {x}?",
        "Which class is the base of {x}?",
        "What class does {x} inherit from?",
        "Which class does {x} inherit from?",
        "What does {x} inherit from?",
        "What does {x} derive from?",
        "Which class does {x} derive from?",
        "{x} is a subclass of what?",
        "{x} is a subclass of which class?",
        "What is {x} a subclass of?",
        "What does {x} extend?",
        "Which class does {x} extend?",
        "What is the parent of {x}?",
        "What is the parent class of {x}?",
        "What is the superclass of {x}?",
        "Tell me the base class of {x}.",
        "Tell me the parent of {x}.",
        "Base class of {x}?",
        "Do you know the base class of {x}?",
    ),
    "members": (
        "What is in {x}?",
        "What's in {x}?",
        "What does {x} contain?",
        "What does {x} have?",
        "What can I find in {x}?",
        "What does {x} offer?",
        "What does {x} provide?",
        "Name some members of {x}.",
        "Name a few things in {x}.",
        "Give me some names from {x}.",
        "List some names in {x}.",
        "List the contents of {x}.",
        "List {x}.",
        "Show me what is in {x}.",
        "Tell me what is in {x}.",
        "Which names does {x} have?",
        "Which names are in {x}?",
        "What are the members of {x}?",
        "Which members does {x} have?",
        "dir({x})",
    ),
}

HELD_OUT: dict[str, tuple[str, ...]] = {
    "purpose": (
        "Could you explain to me what {x} is for?",
        "I just found {x}. What does it do exactly?",
        "Please give me a short description of {x}.",
        "What would you use {x} for?",
        "I would like to know what {x} is used for.",
        "Briefly, what does {x} do?",
        "So what is the purpose of {x} in Python?",
        "Can you describe in one sentence what {x} does?",
    ),
    "where": (
        "In which module would I find {x}?",
        "What module should I look in for {x}?",
        "Could you tell me what module {x} comes from?",
        "Which of the modules has {x} in it?",
        "I need {x}, but which module is it in?",
        "Where in the standard library can I find {x}?",
        "Do you remember the module that defines {x}?",
    ),
    "arguments": (
        "Could you list the arguments that {x} takes?",
        "Which arguments can I pass to {x}?",
        "I forgot the parameters of {x}.",
        "What would the signature of {x} be?",
        "What are the names of the arguments of {x}?",
        "How should I call {x}, with which arguments?",
        "Please show me which parameters {x} takes.",
    ),
    "kind": (
        "Is {x} a class, a function or something else?",
        "What sort of object would {x} be?",
        "Could you tell me what kind of thing {x} is?",
        "Do you know if {x} is a function or a class?",
        "I wonder what kind of object {x} is.",
        "Which kind of thing is {x}?",
    ),
    "import": (
        "Which import line do I need to use {x}?",
        "Could you show me how {x} is imported?",
        "What should I import in order to use {x}?",
        "Please give me the import statement for {x}.",
        "I'd like to import {x}, how do I do that?",
        "How would I import {x} in my program?",
    ),
    "base": (
        "Could you tell me the base class of {x}?",
        "From which class does {x} inherit?",
        "Which class is the parent of {x}?",
        "What would be the base class of {x}?",
        "Do you know what {x} inherits from?",
        "{x} inherits from which class?",
    ),
    "members": (
        "Could you name some members of {x}?",
        "Which things can I find in {x}?",
        "Please list what is in {x}.",
        "Can you tell me what {x} contains?",
        "What names can I find in {x}?",
        "Show me some of the names in {x}.",
    ),
}

FOLLOW_UP: dict[str, tuple[str, ...]] = {
    "purpose": (
        "What does it do?",
        "And what does it do?",
        "What is it for?",
        "What is it used for?",
        "And its purpose?",
        "Explain it.",
        "Can you explain it?",
        "Tell me more about it.",
        "Describe it.",
        "Okay, but what does it do?",
        "What does that do?",
        "And what is that for?",
        "What can I do with it?",
    ),
    "where": (
        "And which module is it in?",
        "Which module is it in?",
        "What module is it in?",
        "Where is it?",
        "And where is it defined?",
        "Where can I find it?",
        "Where does it come from?",
        "Which module has it?",
        "And the module?",
        "What module does it belong to?",
        "Which module is that in?",
    ),
    "arguments": (
        "What are its arguments?",
        "And its arguments?",
        "And what are its parameters?",
        "Which arguments does it take?",
        "What arguments does it take?",
        "What does it take?",
        "What is its signature?",
        "And the signature?",
        "How do I call it?",
        "Show me the arguments.",
        "What parameters does it have?",
        "And the arguments?",
    ),
    "kind": (
        "What kind of thing is it?",
        "What kind of object is it?",
        "Is it a function or a class?",
        "Is it a class?",
        "Is it a function?",
        "Is that a class or a function?",
        "And what sort of thing is it?",
    ),
    "import": (
        "How do I import it?",
        "And how do I import it?",
        "What do I have to import?",
        "Show me the import.",
        "And the import?",
        "How is it imported?",
        "Which import do I need?",
    ),
    "base": (
        "What is its base class?",
        "And its base class?",
        "What does it inherit from?",
        "Which class does it inherit from?",
        "And its parent?",
        "What is it a subclass of?",
        "What does it derive from?",
    ),
    "members": (
        "What is in it?",
        "And what is in it?",
        "What does it contain?",
        "Name some of its members.",
        "What can I find in it?",
        "List its contents.",
        "What does it have?",
    ),
}

FOLLOW_UP_HELD_OUT: dict[str, tuple[str, ...]] = {
    "purpose": ("So what does it do?", "Could you explain what it is for?", "What would I use it for?"),
    "where": ("And in which module is it?", "Which module does it come from?", "Where is it defined, then?"),
    "arguments": ("And which arguments does it take?", "Could you show me its signature?", "What are the parameters?"),
    "kind": ("And is it a class or a function?", "What sort of object is it?"),
    "import": ("So how do I import it?", "What is the import line for it?"),
    "base": ("And what does it inherit from?", "Which class is its base?"),
    "members": ("So what does it contain?", "Which names are in it?"),
}

# Parts of further phrasings: a lead with an indirect question or a noun, or an opening with a question about "it".
_ASKING = (
    "Can you tell me",
    "Could you tell me",
    "Do you know",
    "Explain",
    "I am not sure",
    "I don't know",
    "I forgot",
    "I need to know",
    "I want to know",
    "I wonder",
    "I would like to know",
    "I'd like to know",
    "Let me know",
    "Please explain",
    "Please tell me",
    "Remind me",
    "Tell me",
    "Would you tell me",
)
_INDIRECT: dict[str, tuple[str, ...]] = {
    "purpose": (
        "what {x} does",
        "what {x} is",
        "what {x} is for",
        "what {x} is good for",
        "what {x} is used for",
        "what the purpose of {x} is",
        "what to use {x} for",
        "why one would use {x}",
    ),
    "where": (
        "in which module {x} is",
        "what module {x} is from",
        "where to find {x}",
        "where {x} is",
        "where {x} is defined",
        "which module contains {x}",
        "which module has {x}",
        "which module {x} is in",
        "which module {x} belongs to",
    ),
    "arguments": (
        "how to call {x}",
        "how {x} is called",
        "what arguments {x} takes",
        "what parameters {x} has",
        "what to pass to {x}",
        "what {x} takes",
        "which arguments to pass to {x}",
        "which arguments {x} takes",
        "which parameters {x} accepts",
    ),
    "kind": (
        "if {x} is a class",
        "if {x} is a function",
        "what kind of object {x} is",
        "what kind of thing {x} is",
        "what sort of thing {x} is",
        "whether {x} is a class or a function",
    ),
    "import": (
        "how I import {x}",
        "how to import {x}",
        "how {x} is imported",
        "what I have to import for {x}",
        "what to import for {x}",
        "which import {x} needs",
    ),
    "base": (
        "what {x} derives from",
        "what {x} inherits from",
        "what {x} is a subclass of",
        "which class is the base of {x}",
        "which class {x} inherits from",
    ),
    "members": (
        "what I can find in {x}",
        "what is in {x}",
        "what {x} contains",
        "what {x} has",
        "which members {x} has",
        "which names are in {x}",
    ),
}
_REQUESTING = (
    "",
    "Can you give me",
    "Can you show me",
    "Could you give me",
    "Give me",
    "I am looking for",
    "I forgot",
    "I need",
    "I want",
    "I would like to see",
    "Look up",
    "Please give me",
    "Please show me",
    "Remind me of",
    "Show me",
    "Tell me",
    "What about",
    "What would be",
)
_NOUNS: dict[str, tuple[str, ...]] = {
    "purpose": (
        "a description of {x}",
        "an explanation of {x}",
        "the description of {x}",
        "the documentation of {x}",
        "the job of {x}",
        "the meaning of {x}",
        "the purpose of {x}",
        "the use of {x}",
    ),
    "where": (
        "the module of {x}",
        "the module that contains {x}",
        "the module that has {x}",
        "the module with {x}",
        "the name of the module that has {x}",
    ),
    "arguments": (
        "all arguments of {x}",
        "the argument list of {x}",
        "the argument names of {x}",
        "the arguments of {x}",
        "the parameters of {x}",
        "the signature of {x}",
    ),
    "kind": ("the kind of object that {x} is", "the kind of thing {x} is", "the kind of {x}"),
    "import": ("the import for {x}", "the import line of {x}", "the import of {x}", "the import statement of {x}"),
    "base": ("the base class of {x}", "the base of {x}", "the parent class of {x}", "the superclass of {x}"),
    "members": ("a few names from {x}", "some members of {x}", "the contents of {x}", "the members of {x}"),
}
_OPENINGS = (
    "About {x}:",
    "I am reading about {x}.",
    "I came across {x}.",
    "I have a question about {x}.",
    "I have never heard of {x}.",
    "I need {x}.",
    "I saw {x} somewhere.",
    "I use {x}.",
    "I want to use {x}.",
    "It is about {x}.",
    "Look at {x}.",
    "My program uses {x}.",
    "Someone mentioned {x}.",
    "Take {x}.",
    "There is {x}.",
)

SAME_QUESTION = (
    "And {x}?",
    "What about {x}?",
    "And what about {x}?",
    "How about {x}?",
    "The same for {x}, please.",
    "And for {x}?",
    "Now {x}.",
    "Same question for {x}.",
)
SAME_QUESTION_HELD_OUT = ("And how about {x}?", "What about {x}, then?")

_NEVER_TRAINED = {form for forms in (*HELD_OUT.values(), *FOLLOW_UP_HELD_OUT.values()) for form in forms}


def phrasing(kind: str, rng: random.Random) -> str:
    """A phrasing to train on: one of TRAINED or one put together from parts, and never one kept for the evaluation."""
    while True:
        draw = rng.random()
        if draw < 0.5:
            form = rng.choice(TRAINED[kind])
        elif draw < 0.85:
            form = _composed(kind, rng)
        else:
            form = f"{rng.choice(_OPENINGS)} {follow_up(kind, rng)}"
        if form not in _NEVER_TRAINED:
            return form


def follow_up(kind: str, rng: random.Random) -> str:
    """A question about "it" to train on, never one kept for the evaluation."""
    while True:
        form = rng.choice(FOLLOW_UP[kind])
        if rng.random() < 0.3:
            form = _composed(kind, rng).replace("{x}", rng.choice(("it", "it", "that")))
        if form not in _NEVER_TRAINED:
            return form


def _composed(kind: str, rng: random.Random) -> str:
    if rng.random() < 0.6:
        form = f"{rng.choice(_ASKING)} {rng.choice(_INDIRECT[kind])}"
    else:
        form = f"{rng.choice(_REQUESTING)} {rng.choice(_NOUNS[kind])}".strip()
        form = form[0].upper() + form[1:]
    asks = form.startswith(("Can", "Could", "Do", "Would", "What"))
    return form + ("?" if asks or rng.random() < 0.1 else ".")


# The first words of docstrings that tell what a function does, in the imperative.
_VERBS = """
abort accept access acquire add adapt allow alter announce append apply arrange ask assert associate assume attach
attempt bind block break build byteswap byte-compile calculate call cancel cast catch change check choose clean clear
close collapse collect combine compare compile compress compute concatenate configure connect construct continue
convert copy create debug decide decode decompress decrement decorate define delay delegate delete dequeue describe
deserialize detach detect determine disable disassemble discard dispatch display divide do drop dump duplicate emit
empty enable encode end enqueue ensure enter escape evaluate examine execute exit expand expect extend extract fail
feed fetch fill filter find finish flush force fork format free freeze generate get give group guess handle hash hide
hold identify ignore implement import increment indent indicate initialize initiate insert install interact interpret
invert invoke isolate issue iterate join kill leave let list load lock log look loop make manage map mark match merge
modify move normalize obtain open optimize override pack pad parse partition pass patch pause perform pickle place pop
post prepare prettyprint print process produce prompt provide push put queue quit quote raise read recalculate receive
reconfigure record redo reduce register release reload remove rename reopen repeat replace report represent request
require reschedule reserve reset resize resolve restart restore resume retrieve return reveal reverse rewind rotate
round route run save scan schedule search seek select send serialize serve set shift show shuffle signal skip sleep
sort split start step stop store strip submit subscribe summarize suspend swap switch synchronize take tell terminate
test tokenize trace transfer transform translate truncate try turn uncache undo unfreeze unload unlock unmark unpack
unregister unset unsubscribe update upgrade use validate verify visit wait wake walk warn work wrap write yield
""".split()

_ADVERBS = "conditionally immediately incrementally permanently quickly recursively repeatedly unconditionally".split()

_AUXILIARIES = "is are was can will must should has have does represents".split()

_VERBS_OF_A_CLASS = {"build", "construct", "create", "make", "represent", "return"}

_BEFORE_A_NOUN = {"of", "that", "handler"}


def third_person(verb: str) -> str:
    if verb == "do":
        return "does"
    if re.search(r"[^aeiou]y$", verb):
        return verb[:-1] + "ies"
    return verb + ("es" if re.search(r"(s|x|z|ch|sh)$", verb) else "s")


# A word that is a verb and no noun, since an object follows: "and return a ...".
_SECOND_VERB = re.compile(
    rf"\b(and|or|then) ({'|'.join(_VERBS)})\b(?= (?:a|all|an|any|each|it|its|that|the|them|this|True|False|None)\b)"
)

_THIRD_PERSON = {third_person(verb): verb for verb in _VERBS}

_IS = (
    ("Same as ", "is the same as "),
    ("Similar to ", "is similar to "),
    ("Equivalent to ", "is equivalent to "),
    ("Identical to ", "is identical to "),
    ("Like ", "is like "),
    ("Raised ", "is raised "),
    ("Called ", "is called "),
    ("Base class for ", "is the base class for "),
    ("Base class of ", "is the base class of "),
    ("Abstract base class for ", "is the abstract base class for "),
    ("A ", "is a "),
    ("An ", "is an "),
    ("The ", "is the "),
)


def purpose_answer(entry: Entry) -> str:
    """The first sentence of the docstring with the name as its subject, or quoted where grammar does not allow that."""
    sentence = entry.sentence
    subject = f"The {entry.name} module" if entry.kind == "module" else entry.name
    first, _, rest = sentence.partition(" ")
    rest = _SECOND_VERB.sub(lambda match: f"{match[1]} {third_person(match[2])}", rest)
    verb, following = first.lower(), rest.split(" ")[0].strip(".,;")
    more_verbs = re.findall(r"(?:\band|\bor|,|;|\bthen)(?: then)? ([a-z]+)\b", rest)
    if not any(mark in rest for mark in (". ", "; ")) and following not in _BEFORE_A_NOUN:
        if verb in _THIRD_PERSON:
            return f"{subject} {verb} {rest}"
        acts = entry.kind in ("function", "method") or (entry.kind == "class" and verb in _VERBS_OF_A_CLASS)
        if acts and not any(word in _VERBS for word in more_verbs):
            if verb in _VERBS:
                return f"{subject} {third_person(verb)} {rest}"
            if verb in _ADVERBS and following in _VERBS:
                return f"{subject} {verb} {third_person(following)} {rest.partition(' ')[2]}"
    main_clause = re.split(r",| (?:that|which|who|whose|where|when|to|for|if)\b", sentence)[0].split(" ")[1:]
    has_verb = any(word in _THIRD_PERSON or word in _AUXILIARIES for word in main_clause)
    for start, replacement in _IS:
        if sentence.startswith(start) and not (start in ("A ", "An ", "The ") and has_verb):
            return f"{subject} {replacement}{sentence.removeprefix(start)}"
    return f"The documentation of {entry.name} says: {sentence}"


class Knowledge:
    """All entries with what has to be known to ask about them: short names that are unambiguous, members, owners."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = list(entries)
        self.by_name = {entry.name: entry for entry in entries}
        by_short: dict[str, set[str]] = defaultdict(set)
        self.members: dict[str, list[str]] = defaultdict(list)
        for entry in entries:
            if entry.kind == "module":
                continue
            by_short[entry.leaf].add(entry.name)
            if entry.owner:
                by_short[f"{entry.owner.rpartition('.')[2]}.{entry.leaf}"].add(entry.name)
            self.members[entry.owner or entry.module].append(entry.leaf)
        self.short_names: dict[str, list[str]] = defaultdict(list)
        self.ambiguous: dict[str, list[str]] = {}
        for short, names in sorted(by_short.items()):
            if short in self.by_name:
                continue
            if len(names) == 1:
                self.short_names[next(iter(names))].append(short)
            else:
                self.ambiguous[short] = sorted(names, key=lambda name: (name.count("."), name))
        self._spelt = {*self.by_name, *by_short}
        self._known = {name.lower() for name in self._spelt}

    def knows(self, name: str) -> bool:
        """Whether the name, full or short and in any case, is one that can be asked about."""
        return name.lower() in self._known

    def spelling_is_free(self, name: str) -> bool:
        """Whether no name is spelt exactly so."""
        return name not in self._spelt

    def questions(self, entry: Entry) -> list[str]:
        """The kinds of question that have an answer for this entry."""
        kinds = ["purpose", "where", "kind", "import"]
        if entry.kind in ("function", "method", "class"):
            kinds.append("arguments")
        if entry.base:
            kinds.append("base")
        if self.members.get(entry.name):
            kinds.append("members")
        return kinds

    def answer(self, kind: str, entry: Entry) -> str:
        name, module, owner = entry.name, entry.module, entry.owner
        builtin = module == "builtins"
        match kind:
            case "purpose":
                return purpose_answer(entry)
            case "where" if entry.kind == "module":
                return f"{name} is itself a module."
            case "where" if owner:
                return f"{name} is a method of {owner}" + ("." if builtin else f", in the {module} module.")
            case "where":
                return f"{name} is built in." if builtin else f"{name} is in the {module} module."
            case "arguments" if entry.signature is None:
                return f"I don't know the arguments of {name}."
            case "arguments" if entry.signature == "()":
                return f"{name}() takes no arguments."
            case "arguments":
                return f"The signature is {name}{entry.signature}."
            case "kind":
                article = "an" if entry.kind == "exception" else "a"
                return f"{name} is {article} {'built-in ' if builtin and not owner else ''}{entry.kind}.".replace(
                    "an built-in", "a built-in"
                )
            case "import" if builtin:
                return f"{name} is built in: there is nothing to import."
            case "import" if entry.kind == "module":
                return f"Write: import {name}"
            case "import":
                top = (owner or name).removeprefix(f"{module}.")
                return f"Write: from {module} import {top}"
            case "base":
                return f"{name} is a subclass of {entry.base}."
            case "members":
                names = self.members[name]
                rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
                return f"{name} has {', '.join(names[:5])}{rest}."
        raise ValueError(f"no such kind of question: {kind}")

    def which_one(self, short: str) -> str:
        """The answer to a question about a short name that several entries share."""
        names = self.ambiguous[short]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"Several names match {short}: {shown}. Which one do you mean?"
