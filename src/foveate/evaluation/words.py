"""The lemmas of a caption, by nltk's tokenizer, tagger and WordNet: the rule of several scorers."""

from __future__ import annotations

import functools

from ..base.errors import FoveateError

_KINDS = {"J": "a", "V": "v", "N": "n", "R": "r"}  # first letter of a tag -> WordNet's kind


@functools.lru_cache(maxsize=100_000)
def lemmas(text: str, otherwise: str = "") -> tuple[tuple[str, str], ...]:
    """(lemma, Penn tag) of every token; kinds that WordNet does not know are taken as nouns.

    Args:
        otherwise: what a user can do without nltk, the tail of a sentence.

    Raises:
        FoveateError: nltk or its data is missing.
    """
    try:
        import nltk
    except ImportError:
        raise FoveateError(
            f"Words of captions are found with nltk: pip install 'foveate[eval]'{otherwise}."
        ) from None
    try:
        tagged = nltk.pos_tag(nltk.word_tokenize(text))
        lemmatize = nltk.stem.WordNetLemmatizer().lemmatize
        return tuple((lemmatize(word, _KINDS.get(tag[:1], "n")), tag) for word, tag in tagged)
    except LookupError:
        raise FoveateError(
            "Words of captions need nltk's data: python -m nltk.downloader punkt punkt_tab "
            f"averaged_perceptron_tagger averaged_perceptron_tagger_eng wordnet{otherwise}."
        ) from None
