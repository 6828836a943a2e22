"""N-gram overlap against a search with sets of words, lm-eval's own n-grams, and a published case by hand."""

import random

import numpy as np
import pytest
from lm_eval.decontamination.janitor import Janitor

from preflab.data import ngrams
from preflab.data.ngrams import SHORTEST, NgramIndex, words_of

QUESTION = "What is the largest planet in the Solar System, by mass and by volume, as of today?"


def brute_force(documents: list[str], texts: list[str], size: int) -> list[bool]:
    """Every n-gram of every document is searched in every text, as lists of words."""
    result, known = [], [words_of(text) for text in texts]
    for document in documents:
        words = words_of(document)
        length = min(size, len(words))
        wanted = [words[i : i + length] for i in range(len(words) - length + 1)]
        result.append(
            length >= SHORTEST
            and any(gram == text[i : i + length] for gram in wanted for text in known for i in range(len(text)))
        )
    return result


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("chunk", [1 << 20, 1, 7])
def test_overlap_equals_a_search_word_by_word(seed, chunk, monkeypatch):
    """A vocabulary of three words, so that there are many overlaps of every length, also at the ends of texts."""
    monkeypatch.setattr(ngrams, "CHUNK", chunk)
    rng = random.Random(seed)

    def texts(count, longest):
        return [" ".join(rng.choices("abc", k=rng.randrange(longest))) for _ in range(count)]

    documents, training = texts(60, 20), texts(40, 30)
    overlaps = NgramIndex(documents).found_in(iter(training))
    for size in (13, 8):
        expected = brute_force(documents, training, size)
        assert overlaps[size].tolist() == expected
    assert 0 < sum(brute_force(documents, training, 8)) < 60


@pytest.mark.parametrize("size", [13, 8])
def test_words_and_ngrams_are_those_of_lm_eval(size):
    """lm-eval's janitor (GPT-3's procedure) finds the same documents, for documents that are long enough."""
    rng = np.random.default_rng(0)
    vocabulary = "Ah, be! see? (dee) 'ef' ge; ha: eye. jay".split()
    training = [" ".join(rng.choice(vocabulary, 60)) for _ in range(3)]
    cut = training[1].split()[10:]
    documents = [" ".join([*rng.choice(vocabulary, 9), *cut[: int(k)], "end"]) for k in rng.integers(6, 16, 40)]
    janitor = Janitor(ngram_n=size, window_to_remove=0, minimum_slice_length=0, too_dirty_cutoff=1000)
    for text in training:
        janitor.register_contaminant_python(text)
    # A text that is cleaned of an overlap comes back in pieces, or not at all.
    expected = [janitor.clean_python(document) != [document] for document in documents]
    overlaps = NgramIndex(documents, (size,)).found_in(training)[size].tolist()
    assert overlaps == expected and 0 < sum(overlaps) < 40


@pytest.mark.parametrize(
    ("training", "thirteen", "eight"),
    [
        ("I wonder: WHAT is the largest planet in the solar system by mass -- and by volume?", True, True),
        ("the largest planet in the solar system by mass is Jupiter", False, True),
        ("the largest planet in our solar system by mass", False, False),
        ("what is the largest planet in the", False, False),
    ],
)
def test_a_question_by_hand(training, thirteen, eight):
    overlaps = NgramIndex([QUESTION]).found_in([training])
    assert (overlaps[13][0], overlaps[8][0]) == (thirteen, eight)


def test_short_documents_count_as_a_whole():
    index = NgramIndex(["Who then wrote Hamlet first?", "Who wrote Hamlet then?", ""])
    overlaps = index.found_in(["Tell me: who then wrote Hamlet first", "Who wrote Hamlet then?"])
    assert overlaps[13].tolist() == overlaps[8].tolist() == [True, False, False] and index.too_short.sum() == 2
    assert not index.found_in(["then wrote Hamlet first"])[8].any()


def test_an_ngram_does_not_reach_over_two_texts():
    half = QUESTION.split()
    assert not NgramIndex([QUESTION]).found_in([" ".join(half[:7]), " ".join(half[7:14]), " ".join(half[14:])])[8].any()


def test_rows_of_training_data_are_found():
    index = NgramIndex([QUESTION, "Another one that nobody trains on, ever and ever again."])
    assert index.overlaps(["x", f"He asked: {QUESTION}"], 13) and not index.overlaps(["x y z"], 8)
    assert not NgramIndex([]).found_in(["some text"])[13].any()


def test_words_of_languages_without_spaces():
    assert words_of("你好, world") == ["你", "好", "world"] and words_of("don't_stop") == ["dontstop"]
