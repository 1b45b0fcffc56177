from PIL import Image

from lit_safety.report.sheet import GAP, LEFT, NOTHING, PAPER, TILE, Band, Cell, Row, fit, plain_sheet, sheet, veiled


def test_plain_images_stand_in_rows_enlarged_without_smoothing() -> None:
    images = [Image.new("RGB", (2, 3), (50 * n, 0, 0)) for n in range(3)]
    found = plain_sheet([images[:2], images[2:]], gap=1, zoom=3)
    assert found.size == (6 + 1 + 6, 9 + 1 + 9)
    places = [(0, 0), (7, 0), (0, 10), (6, 0), (7, 10)]
    assert [found.getpixel(place) for place in places] == [(0, 0, 0), (50, 0, 0), (100, 0, 0), PAPER, PAPER]


def test_an_image_keeps_its_shape() -> None:
    """Of 8 x 4 in a square of 16: a band of 16 x 8 in the middle."""
    found = fit(Image.new("RGB", (8, 4), (1, 2, 3)), 16)
    assert found.size == (16, 16)
    assert [found.getpixel((3, y)) for y in (0, 3, 4, 11, 12)] == [PAPER, PAPER, (1, 2, 3), (1, 2, 3), PAPER]


def test_a_band_without_heads_texts_and_images_is_still_a_sheet() -> None:
    found = sheet([Band([("", "")], [Row("", [Cell(None)])]), Band([("a", ""), ("b", "c")], [])], foot="end")
    assert found.width == LEFT + 2 * (TILE + GAP)
    assert found.getpixel((LEFT + 5, 2 * GAP + 5)) == NOTHING


def test_fine_lines_are_gone_under_a_veil() -> None:
    board = Image.new("L", (64, 64))
    board.putdata([255 * ((x + y) % 2) for y in range(64) for x in range(64)])
    low, high = veiled(board.convert("RGB")).convert("L").getextrema()
    assert high - low < 40
