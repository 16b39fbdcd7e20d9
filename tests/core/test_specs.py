import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_accel._specs import Registry, Spec, parse_spec


@pytest.mark.parametrize(
    ("text", "name", "args", "kwargs"),
    [
        ("axes", "axes", (), {}),
        ("top_k:0.2", "top_k", (0.2,), {}),
        ("top_k:16", "top_k", (16,), {}),
        ("brick:4x4x4", "brick", ((4, 4, 4),), {}),
        ("window:fullx24x24,stride=1x8x8", "window", (("full", 24, 24),), {"stride": (1, 8, 8)}),
        ("top_p:p=0.9,min=2", "top_p", (), {"p": 0.9, "min": 2}),
        (" top_p : 0.9 , min = 2 ", "top_p", (0.9,), {"min": 2}),
        ("x:true,none,word,-3,1e-5,FALSE", "x", (True, None, "word", -3, 1e-5, False), {}),
    ],
)
def test_parse(text, name, args, kwargs):
    spec = parse_spec(text)
    assert (spec.name, spec.args, dict(spec.kwargs)) == (name, args, kwargs)
    assert [type(value) for value in spec.args] == [type(value) for value in args]
    assert parse_spec(str(spec)) == spec
    assert hash(parse_spec(str(spec))) == hash(spec)


words = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
values = (
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False)
    | st.lists(st.integers(-9, 99), min_size=2, max_size=4).map(tuple)
    | words.filter(lambda word: word not in {"true", "false", "none", "inf", "nan", "infinity"})
)


@given(words, st.lists(values, max_size=3), st.dictionaries(words, values, max_size=3))
def test_round_trip(name, args, kwargs):
    spec = Spec(name, tuple(args), kwargs)
    again = parse_spec(str(spec))
    assert again == spec
    assert again.args == spec.args
    assert again.kwargs == spec.kwargs
    assert str(again) == str(spec)


def test_order_of_keywords_does_not_matter():
    assert parse_spec("a:x=1,y=2") == parse_spec("a:y=2,x=1")
    assert str(parse_spec("a:y=2,x=1")) == "a:x=1,y=2"


def test_count_and_fraction_differ():
    assert parse_spec("top_k:1") != parse_spec("top_k:1.0")
    assert parse_spec("top_k:1") != "top_k:1"


def test_immutable_and_copied():
    given_values = {"min": 2}
    spec = Spec("a", (1,), given_values)
    given_values["min"] = 3
    assert spec.kwargs["min"] == 2
    with pytest.raises(TypeError):
        spec.kwargs["min"] = 4
    assert copy.deepcopy(spec) == spec
    assert parse_spec(spec) is spec


@pytest.mark.parametrize(
    "text",
    ["", ":", "a:", "a:=3", "a:x=", "a:x=1,2", "a:x=1,x=2", "a:1,,2", "a:b c", "a b", "3a", "a:x=1=2", "a:(1,2)=3"],
)
def test_malformed(text):
    with pytest.raises(ValueError, match=r"must|twice") as caught:
        parse_spec(text)
    assert repr(text) in str(caught.value)


def test_misleading_words_and_types():
    with pytest.raises(ValueError, match="must not read as a number"):
        Spec("a", ("12",))
    with pytest.raises(ValueError, match="must be a number"):
        Spec("a", ("x,y",))
    with pytest.raises(ValueError, match="got '1a'"):
        Spec("1a")
    with pytest.raises(TypeError, match="got 3 of type int"):
        parse_spec(3)


@pytest.fixture
def pets():
    registry = Registry("pet")

    @registry.register("cat", paper="arXiv 1234.56789")
    def cat(house, lives: int = 9):
        """Purrs.

        A lot.
        """
        return ("cat", house, lives)

    @registry.register("albatross")
    def albatross(house):
        return "albatross"

    return registry


def test_registry_knows_its_entries(pets):
    assert pets.names() == ["albatross", "cat"]
    assert [entry.name for entry in pets] == ["cat", "albatross"]
    assert len(pets) == 2
    assert "cat" in pets
    assert "dog" not in pets
    entry = pets.entry("cat")
    assert (entry.summary, entry.paper) == ("Purrs.", "arXiv 1234.56789")
    assert pets.entry("albatross").summary == ""


def test_registry_creates(pets):
    assert pets.create("cat:7", "home") == ("cat", "home", 7)
    assert pets.create("cat:lives=3", "home") == ("cat", "home", 3)
    assert pets.create(Spec("cat"), "home") == ("cat", "home", 9)


def test_registry_errors(pets):
    with pytest.raises(ValueError, match="pet must be one of albatross, cat, got 'catt'; did you mean 'cat'"):
        pets.create("catt", "home")
    with pytest.raises(ValueError, match=r"one of albatross, cat, got 'zzz'$"):
        pets.entry("zzz")
    with pytest.raises(ValueError, match=r"pet 'cat' takes \(lives: int = 9\), got 'cat:1,2'"):
        pets.create("cat:1,2", "home")
    with pytest.raises(ValueError, match=r"takes \(nothing\), got 'albatross:1'"):
        pets.create("albatross:1", "home")
    with pytest.raises(ValueError, match="registered already"):
        pets.register("cat")
    with pytest.raises(ValueError, match="got 'a b'"):
        pets.register("a b")
