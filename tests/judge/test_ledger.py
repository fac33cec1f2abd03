"""The ledger of known failures: its language, and what a finding's entry says."""

from __future__ import annotations

import dataclasses
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_ref.semantics import PAPER
from nsa_ref.testing.case import Case
from nsa_ref.testing.conditions import Condition, RuleError
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.ledger import (
    Entry,
    LedgerError,
    ledger_of,
    read_ledger,
    to_toml,
    wrong_entries,
)
from nsa_ref.testing.narrowing import Sample, entry_of, narrowed
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.verdicts import Record

CASE = Case(kv_len=5, q_len=3, selection_block_size=2, dtype="bfloat16", q_heads=4, kv_heads=2)


@pytest.mark.parametrize(
    ("name", "rule", "holds"),
    [
        ("kv_len", 5, True),
        ("kv_len", 4, False),
        ("kv_len", "5", None),
        ("kv_len", [4, 5], True),
        ("kv_len", "4..5", True),
        ("kv_len", "6..9", False),
        ("kv_len", "!= 5", False),
        ("kv_len", ">= 5", True),
        ("kv_len", "> q_len", True),
        ("q_len", "> kv_len", False),
        ("kv_len_mod_selection_block_size", "!= 0", True),
        ("kv_len_mod_selection_block_size", 1, True),
        ("kv_len_mod_sliding_window_size", 0, False),
        ("kv_len_mod_4", 1, True),
        ("kv_len", "5..5", True),
        ("kv_len_mod_4", [1, 3], True),
        ("kv_len_mod_4", "2..3", False),
        ("group_size", 2, True),
        ("num_selection_blocks", 3, True),
        ("dtype", "bfloat16", True),
        ("dtype", ["float32", "float16"], False),
        ("dtype", "!= float32", True),
        ("causal", True, True),
        ("causal", False, False),
        ("causal", "== false", False),
        ("causal", "!= true", False),
        ("causal", "== True", True),
        ("compress_positions", "!= true", True),
        ("input_norm", "== false", True),
        ("input_norm", "!= true", True),
        ("causal", "== no", None),
        ("importance", "== true", None),
        ("importance", "overlap", True),
        ("input_norm", "machine_eps", False),
        ("input_norm", "!= machine_eps", True),
        ("input_norm", [False, "machine_eps"], True),
        ("input_norm", "epsilon", None),
        # what has no meaning
        ("kv_length", 5, None),
        ("kv_len_mod_dtype", 0, None),
        ("dtype_mod_2", 0, None),
        ("kv_len_mod_", 0, None),
        ("kv_len_mod_q_len_mod_q_heads", 0, None),
        ("kv_len", True, None),
        ("kv_len", "long", None),
        ("kv_len", "< long", None),
        ("kv_len", 5.0, None),
        ("kv_len", {"<": 5}, None),
        ("kv_len", [4, "5"], None),
        ("dtype", "float8", None),
        ("dtype", "< float32", None),
        ("importance", "mean", None),
        ("causal", 1, None),
    ],
)
def test_a_condition_is_a_small_closed_language(name: str, rule: Any, holds: bool | None) -> None:
    """None: it has no meaning, and is refused when it is read, not when a case is met."""
    if holds is None:
        with pytest.raises(RuleError):
            Condition(name, rule)
    else:
        assert Condition(name, rule).holds(CASE) is holds


ENTRY = Entry(
    id="short-last-block",
    clause=("F2",),
    why='see "our" issue\n#12 at C:\\port',
    where=(Condition("kv_len_mod_selection_block_size", "!= 0"), Condition("causal", True)),
)


def test_an_entry_is_read_as_it_was_written(tmp_path: Path) -> None:
    ledger = tmp_path / "known.toml"
    other = dataclasses.replace(ENTRY, id="other", clause=("F1", "A1"), property="fine_*", where=())
    ledger.write_text(to_toml(ENTRY) + "\n" + to_toml(other))
    assert read_ledger(ledger) == (ENTRY, other)


class First(Implementation):
    name = "first"


class Second(Implementation):
    name = "second, flex"


def test_an_entry_may_be_about_one_of_several_implementations(tmp_path: Path) -> None:
    """Two adapters in one folder have one ledger."""
    ledger = tmp_path / "known.toml"
    of_second = dataclasses.replace(ENTRY, id="of second", implementation="*, flex")
    ledger.write_text(to_toml(ENTRY) + to_toml(of_second))
    assert ledger_of(First(), ledger) == (ENTRY,)
    assert ledger_of(Second(), ledger) == (ENTRY, of_second)


@given(st.text())
def test_any_reason_can_be_written(why: str) -> None:
    fits = why.encode(errors="replace").decode()
    reason = fits if fits.strip() else "nothing"
    written = to_toml(dataclasses.replace(ENTRY, why=reason))
    assert tomllib.loads(written)["known"][0]["why"] == reason


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[[known]", "known.toml"),
        ("[[unknown]]", "[[known]] tables"),
        ("known = 3", "[[known]] tables"),
        ('[[known]]\nclause = "F2"\nwhy = "x"', "entry 1: id is missing"),
        ('[[known]]\nid = "a"\nclause = "F2"', "entry 'a': why is missing"),
        ('[[known]]\nid = "a"\nwhy = "x"', "neither a clause nor a property"),
        ('[[known]]\nid = "a"\nwhy = "x"\nmethod = "fein"', "no property of this version"),
        ('[[known]]\nid = "a"\nwhy = "x"\nclause = "F9"', "clause='F9' must be one of"),
        (
            '[[known]]\nid = "a"\nwhy = "x"\nclause = "I4"\nmethod = "sliding"',
            "clause='I4' is not broken by method='sliding'; it is asked of select",
        ),
        (
            '[[known]]\nid = "a"\nwhy = "x"\nclause = ["W1", "I4"]\nproperty = "A1_sliding*"',
            "clause='I4' is not broken by property='A1_sliding*'; it",
        ),
        ('[[known]]\nid = "a"\nwhy = "x"\nproperty = "find_*"', "no property of this version"),
        ('[[known]]\nid = "a"\nwhy = "x"\nclause = "F2"\nstatus = "ok"', "status='ok'"),
        ('[[known]]\nid = "a"\nwhy = "x"\nclause = "F2"\nwhen = "x"', "'when' is no key"),
        ('[[known]]\nid = "a"\nwhy = 3\nclause = "F2"', "must be a text"),
        ('[[known]]\nid = "a"\nwhy = " "\nclause = "F2"', "why is missing"),
        ('[[known]]\nid = "a"\nwhy = "x"\nclause = []', "clause = [] names nothing"),
        ('[[known]]\nid = "a"\nwhy = "x"\nclause = "F2"\nmethod = ""', "method = '' names nothing"),
        ('[[known]]\nid = "a"\nwhy = "x"\nclause = "F2"\npropery = "x"', "mean property?"),
        ('[[known]]\nid = "a"\nwhy = "x"\nclause = "F2"\nwhere = { dtype = [] }', "dtype = []"),
        ('[known]\nid = "a"', "[[known]] tables"),
        (2 * '[[known]]\nid = "a"\nwhy = "x"\nclause = "F2"\n', "the same id"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    ledger = tmp_path / "known.toml"
    ledger.write_text(text)
    with pytest.raises(LedgerError) as error:
        read_ledger(ledger)
    assert named in str(error.value) and "known.toml" in str(error.value)


def test_a_clause_that_a_property_finds_broken_besides_its_own_is_accepted(tmp_path: Path) -> None:
    """A mask may be seen to be wrong in outputs and gradients."""
    ledger = tmp_path / "known.toml"
    for what in ('method = "fine_vjp"', 'property = "A1_fine_output"'):
        ledger.write_text(f'[[known]]\nid = "a"\nwhy = "x"\nclause = "F2"\n{what}')
        (entry,) = read_ledger(ledger)
        (pattern,) = {entry.method, entry.property} - {""}
        about = {p.name for p in PROPERTIES.values() if entry.is_about(p)}
        assert about == {p.name for p in PROPERTIES.values() if pattern in (p.called, p.name)}


def test_a_ledger_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"known\.toml"):
        read_ledger(tmp_path / "known.toml")


@pytest.mark.parametrize(
    ("name", "rule", "right"),
    [
        ("kv_len_mod_0", 0, "at least 2"),
        ("kv_len_mod_1", 0, "at least 2"),
        ("kv_len_mod_kv_len", 0, "another field"),
        ("kv_len_mod_4", 4, "0 to 3"),
        ("kv_len_mod_4", "3..4", "0 to 3"),
        ("kv_len_mod_4", "!= 7", "0 to 3"),
        ("kv_len", "== kv_len", "another field"),
        ("kv_len", [], "a value at least"),
        ("dtype", [], "a value at least"),
        ("kv_len", "8..2", "'2..8'"),
        ("kv_len", -1, "at least 0"),
        ("kv_len", "< 0", "never holds: kv_len is at least 0"),
        ("head_dim", 0, "never holds: head_dim is at least 1"),
        ("head_dim", [0], "never holds: head_dim is at least 1"),
        ("head_dim", "0..0", "never holds: head_dim is at least 1"),
        ("head_dim", "<= num_mem_kv", None),
        ("kv_heads", "< 1", "never holds: kv_heads is at least 1"),
        ("group_size", 0, "never holds: group_size is at least 1"),
        ("compress_block_size", "<= 0", "never holds: compress_block_size is at least 1"),
        ("num_selected_blocks", 0, None),
        ("head_dim", [0, 64], None),
        ("head_dim", "0..64", None),
        ("head_dim", "!= 0", None),
        ("head_dim", "> 0", None),
        ("q_heads", "< kv_heads", "never holds: kv_heads is at most q_heads"),
        ("kv_heads", "> q_heads", "never holds: kv_heads is at most q_heads"),
        ("kv_heads", "< q_heads", None),
        ("group_size", "> q_heads", "never holds: group_size is at most q_heads"),
        ("num_compress_blocks", "> kv_len", "never holds: num_compress_blocks is at most kv_len"),
        ("kv_len", "< num_selection_blocks", "never holds: num_selection_blocks is at most kv_len"),
        ("selection_block_size", "< compress_block_sliding_stride", "never holds: compress_block"),
        ("q_heads_mod_kv_heads", "!= 0", "never holds: kv_heads divides q_heads"),
        ("q_heads_mod_kv_heads", "1..3", "never holds: kv_heads divides q_heads"),
        ("q_heads_mod_kv_heads", "> 0", "never holds: kv_heads divides q_heads"),
        ("q_heads_mod_kv_heads", 0, None),
        ("q_heads_mod_kv_heads", "== head_dim", "never holds: kv_heads divides q_heads"),
        ("q_heads_mod_kv_heads", "== num_mem_kv", None),
        ("q_heads_mod_group_size", 1, "never holds: group_size divides q_heads"),
        (
            "selection_block_size_mod_compress_block_sliding_stride",
            "!= 0",
            "never holds: compress_block_sliding_stride divides selection_block_size",
        ),
        ("kv_len_mod_q_len", ">= q_len", "never holds: a remainder is less than q_len"),
        ("kv_len_mod_q_len", "< q_len", None),
        ("kv_len_mod_head_dim", 0, None),
        ("kv_len", "5", "a whole number"),
        ("kv_len", "=> 5", "'>= q_len'"),
        ("kv_len", 5.0, "a whole number"),
        ("kv_len", {"<": 5}, "a whole number"),
        ("causal", "yes", "true or false"),
        ("causal", 1, "true or false"),
        ("empty_row", "zero", "no field of a case"),
        ("score_floor", 1, "no field of a case"),
        ("dtype", 3, "'bfloat16'"),
        ("dtype", "2..8", "'bfloat16'"),
        ("dtype", "float8", "'bfloat16'"),
        ("dtype", "bfloat", "'bfloat16'"),
        ("kv_length", 5, "kv_len"),
        ("selection_size", 5, "selection_block_size"),
        ("kv_len_mod_selection_size", 0, "selection_block_size"),
        ("zzz", 5, "compress_block_size"),
    ],
)
def test_a_rule_without_meaning_is_told_what_would_be_right(
    tmp_path: Path, name: str, rule: Any, right: str | None
) -> None:
    """None: it has a meaning."""
    if right is None:
        assert Condition(name, rule).reads
        return
    with pytest.raises(RuleError) as error:
        Condition(name, rule)
    line = str(error.value)
    assert right in line.lower() and "\n" not in line
    assert name.partition("_mod_")[0] in line or name.rpartition("_mod_")[2] in line
    assert str(rule) in line or repr(rule) in line or "'kv_len_mod" in line or "no field" in line


def test_an_entry_explains_its_own_clause_alone() -> None:
    """A property that is about something else may have found it; another clause is a finding."""
    prop = next(p for p in PROPERTIES.values() if p.name.startswith("fine"))
    assert ENTRY.explains(prop, "F2", CASE) and not ENTRY.explains(prop, "F1", CASE)
    assert not ENTRY.explains(prop, "F2", dataclasses.replace(CASE, kv_len=4))
    acausal = dataclasses.replace(PAPER, causal=False)
    assert not ENTRY.explains(prop, "F2", dataclasses.replace(CASE, semantics=acausal))


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"inside": 3, "outside": 5, "known": 2}, []),
        ({"inside": 3, "outside": 5, "spared": 3}, []),
        ({"inside": 0, "outside": 5, "known": 1}, []),
        ({"inside": 0, "outside": 5}, [("no case", "a", 5)]),
        ({"inside": 3, "outside": 5, "held": 2}, [("stale", "a", 2)]),
        ({"inside": 3, "outside": 5}, []),  # none of them was decided
        ({"inside": 3, "outside": 0, "known": 3}, [("every case", "a", 3)]),
        ({"inside": 0, "outside": 0, "known": 1}, []),
    ],
)
def test_an_entry_that_says_too_much_or_nothing_is_remarked(
    counts: dict[str, int], said: list[Any]
) -> None:
    record = Record(name="fine_forward", clause="A1")
    for name, count in counts.items():
        getattr(record, name)["a"] = count
    assert wrong_entries([record]) == said


ABSENT: dict[str, Any] = {"cases": 0, "asked": 0, "not_offered": Counter({"decode": 1})}


@pytest.mark.parametrize(
    ("fields", "record", "said"),
    [
        ({"implementation": "second*"}, ABSENT, [("no implementation", "a", "second*")]),
        ({"implementation": "second*"}, {"cases": 9}, [("no implementation", "a", "second*")]),
        ({}, ABSENT, [("nothing offered", "a")]),
        ({"implementation": "fi*"}, ABSENT, [("nothing offered", "a")]),
        # it may be offered
        ({}, {"asked": 9, "unreached": 9}, []),
        ({}, {"not_tried": Counter({("slow pace",): 1})}, []),
        ({}, {"lost": True}, []),
        # it is counted, and what is wrong with it is named as ever
        ({}, {"cases": 9, "outside": Counter({"a": 9})}, [("no case", "a", 9)]),
    ],
)
def test_an_entry_about_what_was_not_judged_is_remarked(
    fields: dict[str, Any], record: dict[str, Any], said: list[Any]
) -> None:
    entry = Entry(id="a", why="x", property="G3_decode", **fields)
    records = [
        Record(name="G3_decode", clause="G3", implementation="first", **record),
        Record(name="A1_sliding_output", clause="A1", implementation="first", cases=9),
    ]
    assert wrong_entries(records, [entry]) == said


def _sample(breaks: Any) -> Sample:
    sample = Sample([], [])
    for kv_len in range(1, 12):
        for block in (2, 4):
            for dtype in ("float32", "bfloat16"):
                case = Case(kv_len=kv_len, q_len=3, selection_block_size=block, dtype=dtype)
                (sample.broken if breaks(case) else sample.passed).append(case)
    return sample


@pytest.mark.parametrize(
    ("breaks", "where"),
    [
        (
            lambda case: case.kv_len % case.selection_block_size != 0,
            {"kv_len_mod_selection_block_size": "!= 0"},
        ),
        (
            lambda case: case.kv_len < case.selection_block_size,
            {"kv_len": "< selection_block_size"},
        ),
        (lambda case: case.dtype == "bfloat16", {"dtype": "bfloat16"}),
        (
            lambda case: case.dtype == "bfloat16" and case.kv_len == case.selection_block_size,
            {"kv_len": "== selection_block_size", "dtype": "bfloat16"},
        ),
        (lambda case: case.kv_len >= 5, {"kv_len": ">= 5"}),
        (lambda case: True, {}),
    ],
)
def test_an_entry_is_as_narrow_as_the_sample(breaks: Any, where: dict[str, Any]) -> None:
    assert {c.name: c.rule for c in narrowed(_sample(breaks))} == where


def test_a_switch_of_words_and_truths_tells_cases_apart() -> None:
    """Its values have no order among themselves."""
    values = (False, "machine_eps", True)
    cases = [Case(semantics=dataclasses.replace(PAPER, input_norm=value)) for value in values]
    (condition,) = narrowed(Sample(cases[1:2], [cases[0], cases[2]]))
    assert (condition.name, condition.rule) == ("input_norm", "machine_eps")
    assert not narrowed(Sample(cases[:2], cases[2:]))


@pytest.mark.parametrize(("longest", "rule"), [(11, ">= 5"), (30, "5..10")])
def test_a_range_ends_where_more_than_one_case_says_so(longest: int, rule: str) -> None:
    """Else what is longer than the sample would be a finding of its own."""
    broken = [Case(kv_len=n, q_len=3) for n in range(5, 11)]
    passed = [Case(kv_len=n, q_len=3, seed=1) for n in range(1, longest + 1)]
    passed += [Case(kv_len=n, q_len=3, seed=seed) for n in range(1, 5) for seed in (2, 3)]
    assert [(c.name, c.rule) for c in narrowed(Sample(broken, passed))] == [("kv_len", rule)]


@pytest.mark.parametrize(
    ("names", "method"),
    [
        (("W1_sliding_mask_as_exposed", "W3_sliding_mask_as_exposed"), "sliding_mask"),
        (("W1_sliding_mask_as_exposed", "A1_sliding_output"), "sliding*"),
        (("A1_sliding_output", "A3_sliding_gradients"), "sliding*"),
        (("A1_sliding_output", "A1_fine_output"), ""),
        (("G1_layer_output", "G1_layer_output_with_blocks"), "layer*"),
    ],
)
def test_an_entry_names_the_methods_that_its_cause_was_found_in(
    names: tuple[str, ...], method: str
) -> None:
    """A mask that is shown wrongly says nothing of the one that is used."""
    alike = [
        {"property": name, "clause": PROPERTIES[name].clause, "kind": "wrong mask", "text": "wrong"}
        for name in names
    ]
    entry = entry_of(alike, ())
    assert entry.method == method
    assert set(entry.clause) == {PROPERTIES[name].clause for name in names}
