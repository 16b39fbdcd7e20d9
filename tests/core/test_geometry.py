import pytest

from dit_accel.geometry import TokenGeometry


def test_counts_follow_from_the_grid():
    geometry = TokenGeometry((21, 30, 52), prefix=226, suffix=4)
    assert geometry.visual == 32760
    assert geometry.tokens == 32990
    assert geometry.extra == 230
    assert geometry.visual_slice == slice(226, 32986)
    assert geometry.is_video
    assert geometry.axes == (21, 30, 52)


def test_flat_geometry_has_one_axis():
    geometry = TokenGeometry.flat(1000, suffix=7)
    assert geometry.grid is None
    assert not geometry.is_video
    assert geometry.axes == (1, 1, 1000)
    assert geometry.tokens == 1007


def test_is_a_key_of_caches():
    a, b = TokenGeometry((2, 3, 4), 5), TokenGeometry((2, 3, 4), 5, visual=24)
    assert a == b
    assert hash(a) == hash(b)
    assert a != TokenGeometry((2, 4, 3), 5)
    assert TokenGeometry.flat(24) != TokenGeometry((1, 1, 24))
    assert hash(TokenGeometry([2, 3, 4])) == hash(TokenGeometry((2, 3, 4)))


@pytest.mark.parametrize(
    ("geometry", "text"),
    [
        (TokenGeometry((21, 30, 52), 226), "21x30x52 (+226 text)"),
        (TokenGeometry((1, 64, 64)), "1x64x64"),
        (TokenGeometry((1, 64, 64), suffix=512), "1x64x64 (+512 text behind)"),
        (TokenGeometry((1, 64, 64), 2, 3), "1x64x64 (+2 text, +3 behind)"),
        (TokenGeometry.flat(9, 1), "9 flat (+1 text)"),
    ],
)
def test_reads_well(geometry, text):
    assert str(geometry) == text


def test_check_says_what_does_not_fit():
    geometry = TokenGeometry((2, 3, 4), 5)
    assert geometry.check(29) is None
    reason = geometry.check(24)
    assert "29" in reason
    assert "got 24" in reason
    assert "2x3x4 (+5 text)" in reason


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TokenGeometry((0, 3, 4)), ValueError, "frames of grid must be at least 1, got 0"),
        (lambda: TokenGeometry((3, 4)), ValueError, r"\(frames, height, width\).*got \(3, 4\)"),
        (lambda: TokenGeometry((1, 3, 4.0)), TypeError, "width must be an int, got 4.0"),
        (lambda: TokenGeometry((1, 3, 4), prefix=-1), ValueError, "prefix .* got -1"),
        (lambda: TokenGeometry((1, 3, 4), suffix=True), TypeError, "suffix .* got True"),
        (lambda: TokenGeometry((1, 3, 4), visual=13), ValueError, r"1\*3\*4 = 12 .* got 13"),
        (lambda: TokenGeometry(None), ValueError, "visual must be at least 1"),
        (lambda: TokenGeometry.flat(0), ValueError, "got 0"),
    ],
)
def test_errors_say_value_and_expectation(make, error, message):
    with pytest.raises(error, match=message):
        make()
